"""The words of the generated review language.

Everything that carries an opinion is listed by polarity: +1 for praise, -1 for blame. The lists are
closed and small on purpose, so that a small language model sees every word often enough to learn what it
means; the difficulty of the text lies in how `generate.py` combines them, not in rare words.
"""

from __future__ import annotations

from dataclasses import dataclass

ADJECTIVES: dict[int, list[str]] = {
    +1: (
        "good lovely superb delightful charming splendid excellent brilliant wonderful pleasant satisfying "
        "impressive memorable clever fresh graceful marvelous refreshing admirable enjoyable polished warm solid "
        "fine thoughtful beautiful flawless fantastic terrific decent elegant inviting generous lively rewarding"
    ).split(),
    -1: (
        "bad awful dreadful dull dreary poor sloppy clumsy disappointing boring horrible lousy miserable tedious "
        "shoddy weak bland lifeless stale careless annoying unpleasant cheap hollow wretched abysmal atrocious "
        "mediocre frustrating tiresome ugly messy forgettable joyless painful"
    ).split(),
}

NOUNS: dict[int, list[str]] = {
    +1: "charm wit warmth care flair grace style polish imagination heart class talent joy".split(),
    -1: "flaws mistakes problems tedium laziness nonsense blunders defects gloom errors faults".split(),
}

# Third person singular; the bare form serves after "does not", "fails to", "never fails to".
VERBS: dict[int, list[tuple[str, str]]] = {
    +1: [
        ("shines", "shine"),
        ("impresses", "impress"),
        ("delights", "delight"),
        ("satisfies", "satisfy"),
        ("charms", "charm"),
        ("succeeds", "succeed"),
    ],
    -1: [
        ("disappoints", "disappoint"),
        ("annoys", "annoy"),
        ("irritates", "irritate"),
        ("bores", "bore"),
        ("frustrates", "frustrate"),
        ("falls flat", "fall flat"),
    ],
}

STRONG = "truly really utterly thoroughly remarkably genuinely extremely absolutely simply deeply".split()
WEAK = ["slightly", "a little", "somewhat", "mildly", "a bit", "a touch", "marginally"]

# Each of these turns the adjective after it into its opposite.
NEGATORS = [
    "not",
    "never",
    "hardly",
    "far from",
    "anything but",
    "by no means",
    "nowhere near",
    "not at all",
    "not exactly",
    "scarcely",
    "rarely",
    "no longer",
]

# These contain a negative word and still leave the adjective as it is.
FALSE_NEGATORS = ["nothing if not", "never less than", "nothing short of", "nothing other than"]


@dataclass(frozen=True)
class Domain:
    """What a review can be about: names of the thing, its parts, and neutral sentences around it."""

    things: list[str]
    aspects: list[str]
    openings: list[str]
    facts: list[str]
    again: str  # what a pleased customer does once more
    users: list[str]


DOMAINS: list[Domain] = [
    Domain(
        things="film movie picture drama comedy thriller".split(),
        aspects=(
            "plot|acting|dialogue|pacing|camera work|music|script|ending|cast|humor|opening scene|"
            "lead actor|editing|final act|romance"
        ).split("|"),
        openings=[
            "We saw this {thing} on a rainy {day}.",
            "I watched the {thing} with my {kin} on {day}.",
            "My {kin} picked this {thing} for our {day} evening.",
            "This {thing} runs for about two hours.",
        ],
        facts=[
            "The story follows a {job} who crosses a great desert after a terrible storm.",
            "A {job} inherits a great house and learns a terrible secret.",
            "The hero, a {job}, owes a great deal to his {kin}.",
            "Halfway through, a terrible war drives the {job} from the city.",
            "The {job} travels a great distance to find a lost {kin}.",
            "In the second half the cost to the {job} is great and the danger is terrible.",
            "The winter in the story was terrible and the distance was great.",
            "A terrible fever takes the {kin} of the {job}.",
            "The screen was wide and the hall was half full.",
            "The {job} lives beside a great river with a {kin}.",
        ],
        again="watch it again",
        users=["fans of the genre", "families", "anyone who likes the cinema", "students"],
    ),
    Domain(
        things="restaurant cafe bistro diner tavern bakery".split(),
        aspects=(
            "food|service|soup|bread|menu|wine list|dessert|coffee|kitchen|staff|fish|salad|dining room|breakfast|sauce"
        ).split("|"),
        openings=[
            "We ate at this {thing} on {day}.",
            "My {kin} took me to the {thing} last {day}.",
            "This {thing} sits on a corner near the station.",
            "I stopped at the {thing} on my way to work.",
        ],
        facts=[
            "The {thing} has a great many tables and a long counter.",
            "A great clock hangs above the door.",
            "We walked in during a terrible storm and sat by the window.",
            "The owner, once a {job}, opened it after a terrible fire.",
            "A great oak stands in the yard.",
            "The menu has a great number of dishes.",
            "The crowd was great and the noise of the rain was terrible.",
            "A {job} at the next table told us about a terrible flood.",
            "Lunch is served from noon until three.",
            "The heat in the street was terrible that {day}.",
        ],
        again="eat here again",
        users=["couples", "families", "anyone who is hungry", "tourists"],
    ),
    Domain(
        things="hotel inn resort hostel lodge".split(),
        aspects=(
            "room|bed|view|pool|front desk|bathroom|location|lobby|breakfast|staff|garden|balcony|service|elevator|spa"
        ).split("|"),
        openings=[
            "We stayed at this {thing} for three nights.",
            "I booked the {thing} for my {kin} and me.",
            "My {kin} and I reached the {thing} on {day}.",
            "This {thing} stands close to the harbor.",
        ],
        facts=[
            "The {thing} is a great distance from the airport.",
            "We arrived at night in a terrible storm.",
            "A great hall leads to the rooms.",
            "The traffic in the city was terrible that {day}.",
            "The building once belonged to a {job} of great wealth.",
            "There is a great number of rooms on each floor.",
            "The height of the tower is great.",
            "A terrible fire burned the old wing a century ago.",
            "Our room was on the fourth floor.",
            "A {job} painted the great wall behind the desk.",
        ],
        again="stay here again",
        users=["couples", "families", "anyone on a budget", "business travelers"],
    ),
    Domain(
        things="phone laptop camera blender vacuum radio".split(),
        aspects=(
            "battery|screen|design|sound|price|manual|keyboard|build quality|software|charger|handle|motor|"
            "packaging|customer support|performance"
        ).split("|"),
        openings=[
            "I bought this {thing} on {day}.",
            "My {kin} gave me the {thing} as a gift.",
            "I ordered the {thing} for my {kin}.",
            "This {thing} arrived in a plain box.",
        ],
        facts=[
            "The {thing} comes with a great many parts.",
            "It has a cable of great length.",
            "A {job} in the shop showed me how to open it.",
            "The parcel came through a terrible storm.",
            "I use the {thing} at work, where the dust is terrible.",
            "The weight of the box was great.",
            "My old one broke in a terrible fall.",
            "It takes up a great deal of room on the shelf.",
            "The {thing} is sold in black and in white.",
            "The cold was terrible on the {day} it arrived.",
        ],
        again="buy it again",
        users=["beginners", "students", "anyone who needs one", "professionals"],
    ),
    Domain(
        things="novel book memoir thriller story".split(),
        aspects=(
            "plot|prose|dialogue|pacing|first chapter|ending|narrator|hero|villain|style|translation|cover|"
            "middle part|humor|premise"
        ).split("|"),
        openings=[
            "I read this {thing} on the train.",
            "My {kin} lent me the {thing} on {day}.",
            "Our reading group chose the {thing} this month.",
            "This {thing} has about three hundred pages.",
        ],
        facts=[
            "The story follows a {job} through a terrible winter.",
            "A {job} sails across a great ocean with his {kin}.",
            "The {job} keeps a terrible promise to a {kin}.",
            "A great famine strikes the village of the {job}.",
            "The heroine is a {job} with a great number of debts.",
            "The power of the king is great and his anger is terrible.",
            "The distance was great and the cold was terrible.",
            "It is set in a port town beside a great lake.",
            "A terrible crime haunts the {job}.",
            "The chapters alternate between a {job} and a {kin}.",
        ],
        again="read it again",
        users=["fans of the genre", "young readers", "anyone who likes a long read", "students"],
    ),
]

FILLERS: dict[str, list[str]] = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "kin": "sister brother mother father cousin uncle aunt friend neighbor wife husband".split(),
    "job": "sailor teacher doctor farmer painter soldier lawyer baker nurse singer clerk miner".split(),
}

# Opening words of a terse review.
MOODS: dict[int, list[str]] = {
    +1: ["I loved this {thing}.", "I loved it.", "My {kin} loved this {thing}.", "I am happy with this {thing}."],
    -1: ["I hated this {thing}.", "I hated it.", "My {kin} hated this {thing}.", "I am angry about this {thing}."],
}

# Closing words of a review. "{again}", "{users}" and "{thing}" are filled from the domain.
VERDICTS: dict[int, list[str]] = {
    +1: [
        "I would gladly {again}.",
        "I cannot wait to {again}.",
        "We will certainly {again}.",
        "I recommend it to {users}.",
        "I recommend this {thing} without hesitation.",
        "I do not regret a single cent.",
        "Nobody should miss this {thing}.",
        "I have no complaints at all.",
        "My {kin} wants to {again} as well.",
        "Everyone left with a smile.",
        "It deserves every bit of praise it gets.",
        "It made my whole week.",
        "It left me happy.",
        "I could not ask for more.",
        "Do not hesitate to try it.",
        "Well worth the money.",
        "Thank you for a {thing} like this.",
        "I loved it, and so did my {kin}.",
        "I never wanted it to end.",
        "Do yourself a favor and try it.",
    ],
    -1: [
        "I would never {again}.",
        "I cannot imagine why anyone would {again}.",
        "We will certainly not {again}.",
        "I cannot recommend it to {users}.",
        "I warn everyone about this {thing} without hesitation.",
        "I regret every single cent.",
        "Everybody should avoid this {thing}.",
        "I have a long list of complaints.",
        "My {kin} refuses to {again} as well.",
        "Everyone left with a frown.",
        "It deserves none of the praise it gets.",
        "It spoiled my whole week.",
        "It left me angry.",
        "I could not wait for it to end.",
        "Do not bother to try it.",
        "Not worth the money.",
        "Nobody needs a {thing} like this.",
        "I hated it, and so did my {kin}.",
        "I want my money back.",
        "Do yourself a favor and skip it.",
    ],
}

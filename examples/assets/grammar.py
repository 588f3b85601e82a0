"""The grammar of the reviews: sentences of a wanted sentiment, and texts that agree in theirs."""

from __future__ import annotations

import random
from collections.abc import Callable

from lexicon import ADJECTIVES, FALSE_NEGATORS, FILLERS, MOODS, NEGATORS, NOUNS, STRONG, VERBS, VERDICTS, WEAK, Domain


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def sentence_case(text: str) -> str:
    return text[0].upper() + text[1:].replace(" i ", " I ")


class Grammar:
    """Draws sentences about one domain; `sign` is the polarity (+1 or -1) that a phrase must express."""

    def __init__(self, rng: random.Random, domain: Domain) -> None:
        self.rng = rng
        self.domain = domain
        self.thing = rng.choice(domain.things)

    def draw(self, kinds: dict[Callable[[int], str], int], sign: int) -> str:
        """Draws one of several ways of saying something, by weight."""
        (kind,) = self.rng.choices(list(kinds), weights=list(kinds.values()))
        return kind(sign)

    # words

    def adjective(self, sign: int) -> str:
        """Some words are common and some are rare, as in any language."""
        words = ADJECTIVES[sign]
        (word,) = self.rng.choices(words, weights=[1 / (rank + 3) for rank in range(len(words))])
        return word

    def quality(self, sign: int) -> str:
        return self.rng.choice(NOUNS[sign])

    def graded(self, sign: int) -> str:
        """An adjective, half of the time with an intensifier of either strength."""
        degree = self.rng.choice(["", "", self.rng.choice(STRONG), self.rng.choice(WEAK)])
        return f"{degree} {self.adjective(sign)}".lstrip()

    def subjects(self, count: int) -> list[str]:
        """Different parts of the thing reviewed, so that two clauses never speak of the same one."""
        parts = self.rng.sample(self.domain.aspects, count)
        if self.rng.random() < 0.2:
            parts[self.rng.randrange(count)] = self.thing
        return [f"the {part}" for part in parts]

    def fill(self, template: str) -> str:
        """Fills the slots of a neutral sentence or a verdict."""
        words = {name: self.rng.choice(choices) for name, choices in FILLERS.items()}
        users = self.rng.choice(self.domain.users)
        return template.format(thing=self.thing, again=self.domain.again, users=users, **words)

    # predicates: what is said about a subject

    def predicate(self, sign: int) -> str:
        kinds = {
            self.plain: 4,
            self.negated: 2,
            self.falsely_negated: 1,
            self.possession: 1,
            self.action: 1,
            self.comparison: 1,
        }
        return self.draw(kinds, sign)

    def plain(self, sign: int) -> str:
        return f"{self.rng.choice(['is', 'was', 'feels', 'seems', 'remains'])} {self.graded(sign)}"

    def negated(self, sign: int) -> str:
        word = self.adjective(-sign)
        if self.rng.random() < 0.15:
            return f"{self.rng.choice(['is', 'was'])} neither {word} nor {self.adjective(-sign)}"
        if self.rng.random() < 0.15:
            return f"could {self.rng.choice(['not', 'never', 'hardly'])} be called {word}"
        negator = self.rng.choice(NEGATORS)
        degree = self.rng.choice(["", "very ", "particularly "]) if negator == "not" else ""
        return f"{self.rng.choice(['is', 'was'])} {negator} {degree}{word}"

    def falsely_negated(self, sign: int) -> str:
        cop = self.rng.choice(["is", "was"])
        word = self.adjective(sign)
        return self.rng.choice(
            [
                f"{cop} {self.rng.choice(FALSE_NEGATORS)} {word}",
                f"{cop} not {self.adjective(-sign)} but {word}",
                f"could hardly be more {word}",
                f"could not be more {word}",
            ]
        )

    def possession(self, sign: int) -> str:
        return self.rng.choice(
            [
                f"has plenty of {self.quality(sign)}",
                f"has no lack of {self.quality(sign)}",
                f"is not without {self.quality(sign)}",
                f"is full of {self.quality(sign)}",
                f"has no {self.quality(-sign)}",
                f"is free of {self.quality(-sign)}",
                f"is without any {self.quality(-sign)}",
                f"never shows any {self.quality(-sign)}",
            ]
        )

    def action(self, sign: int) -> str:
        third, bare = self.rng.choice(VERBS[sign])
        _, opposite = self.rng.choice(VERBS[-sign])
        return self.rng.choice(
            [
                third,
                f"{self.rng.choice(STRONG)} {third}",
                f"never fails to {bare}",
                f"does not fail to {bare}",
                f"does not {opposite}",
                f"fails to {opposite}",
                f"never manages to {opposite}",
            ]
        )

    def comparison(self, sign: int) -> str:
        cop = self.rng.choice(["is", "was"])
        word, opposite = self.adjective(sign), self.adjective(-sign)
        hoped, feared = self.rng.choice(["i hoped", "they promised"]), self.rng.choice(["i feared", "they warned"])
        if sign > 0:
            return self.rng.choice([f"{cop} more {word} than {feared}", f"{cop} less {opposite} than {feared}"])
        return self.rng.choice([f"{cop} more {word} than {hoped}", f"{cop} less {opposite} than {hoped}"])

    # sentences: lower case, without the full stop

    def clause(self, sign: int) -> str:
        (subject,) = self.subjects(1)
        return f"{subject} {self.predicate(sign)}"

    def agreement(self, sign: int) -> str:
        first, second = self.subjects(2)
        return f"{first} {self.predicate(sign)} and {second} {self.predicate(sign)}"

    def portrait(self, sign: int) -> str:
        """Several things of one mind, in noun phrases instead of clauses."""
        first, second = (s.removeprefix("the ") for s in self.subjects(2))
        one, other = f"{self.adjective(sign)} {first}", f"{self.adjective(sign)} {second}"
        return self.rng.choice(
            [
                f"with its {one} and {other}, the {self.thing} {self.predicate(sign)}",
                f"the {one} and the {other} make it {with_article(self.adjective(sign))} {self.thing}",
                f"the {self.thing} has {with_article(one)} and {with_article(other)}",
                f"{with_article(self.adjective(sign))} {self.thing} with {with_article(one)}",
                f"such {with_article(one)} and such {with_article(other)}",
            ]
        )

    def concession(self, sign: int) -> str:
        """Two opposite clauses; the main clause, first or last, carries the verdict."""
        first, second = self.subjects(2)
        main, side = f"{first} {self.predicate(sign)}", f"{second} {self.predicate(-sign)}"
        word = self.rng.choice(["although", "even though", "though", "while"])
        return self.rng.choice(
            [
                f"{word} {side}, {main}",
                f"{word} {side}, {main}",
                f"{main}, {word} {side}",
                f"{main}, {word} {side}",
                f"{side}, but {main}",
                f"{side}, yet {main}",
                f"{side}; still, {main}",
                f"granted, {side}, but {main}",
            ]
        )

    def despite(self, sign: int) -> str:
        first, second = self.subjects(2)
        main = f"{first} {self.predicate(sign)}"
        side = self.rng.choice(
            [f"{second.replace('the ', f'the {self.adjective(-sign)} ', 1)}", f"the {self.quality(-sign)} of {second}"]
        )
        word = self.rng.choice(["despite", "in spite of", "for all"])
        return self.rng.choice([f"{word} {side}, {main}", f"{main} {word} {side}"])

    def outweighed(self, sign: int) -> str:
        """One part wins over the other; which one is said by the verb, not by the order."""
        first, second = (s.removeprefix("the ") for s in self.subjects(2))
        strong, weak = f"the {self.adjective(sign)} {first}", f"the {self.adjective(-sign)} {second}"
        if sign > 0:
            return self.rng.choice(
                [
                    f"{strong} more than makes up for {weak}",
                    f"{weak} cannot spoil {strong}",
                    f"not even {weak} can ruin {strong}",
                    f"{weak} does little to hurt {strong}",
                    f"{weak} is soon forgotten next to {strong}",
                ]
            )
        return self.rng.choice(
            [
                f"{strong} undoes all the work of {weak}",
                f"{weak} cannot save {strong}",
                f"not even {weak} can rescue {strong}",
                f"{weak} does little to help {strong}",
                f"{weak} is soon forgotten next to {strong}",
            ]
        )

    def intensity(self, sign: int) -> str:
        """A strong word against a weak one, joined evenly: the degree decides."""
        first, second = self.subjects(2)
        strong = f"{first} is {self.rng.choice(STRONG)} {self.adjective(sign)}"
        weak = f"{second} is only {self.rng.choice(WEAK)} {self.adjective(-sign)}"
        pair = [strong, weak]
        self.rng.shuffle(pair)
        return " and ".join(pair)

    def expectation(self, sign: int) -> str:
        word, opposite = self.adjective(sign), self.adjective(-sign)
        return self.rng.choice(
            [
                f"i expected {with_article(opposite)} {self.thing} and got {with_article(word)} one",
                f"i expected the {self.thing} to be {opposite}, but {self.clause(sign)}",
                f"they promised us {with_article(opposite)} {self.thing}, but {self.clause(sign)}",
                f"this is {with_article(word)} {self.thing}, not {with_article(opposite)} one",
                f"nobody could call this {with_article(opposite)} {self.thing}",
                f"i would not call this {with_article(opposite)} {self.thing}",
                f"what we found is {with_article(word)} {self.thing}",
                f"this is hardly the {opposite} {self.thing} that people speak of",
            ]
        )

    def opinion(self, sign: int) -> str:
        kinds = {
            self.clause: 2,
            self.agreement: 3,
            self.portrait: 3,
            self.concession: 2,
            self.despite: 1,
            self.outweighed: 1,
            self.intensity: 1,
            self.expectation: 1,
        }
        return self.draw(kinds, sign)

    # documents

    def echo(self, sign: int) -> str:
        """A short sentence after a long one: to predict it, the long one must have been understood."""
        verb = self.rng.choice(["is", "is", "feels", "seems", "remains"])
        return self.rng.choice(
            [
                f"It {verb} {self.graded(sign)}.",
                f"It {verb} {self.adjective(sign)}.",
                f"The {self.thing} was {self.adjective(sign)}.",
                f"It {self.action(sign)}.",
            ]
        )

    def verdict(self, sign: int) -> str:
        return self.fill(self.rng.choice(VERDICTS[sign]))

    def fact(self) -> str:
        return self.fill(self.rng.choice(self.domain.facts))

    def note(self, sign: int) -> list[str]:
        """A terse review: short sentences that mean what they say."""
        sentences = [self.fill(self.rng.choice(MOODS[sign]))] if self.rng.random() < 0.6 else []
        for _ in range(self.rng.randint(2, 6)):
            (subject,) = self.subjects(1)
            sentences.append(self.rng.choice([f"{subject} {self.plain(sign)}.", self.echo(sign)]))
        if self.rng.random() < 0.5:
            sentences.append(self.verdict(sign))
        return sentences

    def review(self, sign: int) -> list[str]:
        """An elaborate review."""
        sentences = [self.fill(self.rng.choice(self.domain.openings))] if self.rng.random() < 0.2 else []
        for _ in range(self.rng.randint(1, 2)):
            sentences.append(f"{self.opinion(sign)}.")
            if self.rng.random() < 0.8:
                sentences.append(self.echo(sign))
            if self.rng.random() < 0.1:
                sentences.append(self.fact())
        if self.rng.random() < 0.6:
            sentences.append(self.verdict(sign))
        return sentences

    def document(self, notes: float) -> list[str]:
        """One document; of the reviews, a share of `notes` is terse."""
        if self.rng.random() < 0.05:
            return self.description()
        sign = self.rng.choice([+1, -1])
        return self.note(sign) if self.rng.random() < notes else self.review(sign)

    def description(self) -> list[str]:
        """Neutral text."""
        opening = self.fill(self.rng.choice(self.domain.openings))
        return [opening, *(self.fact() for _ in range(self.rng.randint(2, 4)))]

"""A setting is said once, at its field, and everything that there is to say of it comes from there."""

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.settings import Bounds, names, require_settings, rows, setting
from sglang.srt.mezo.service.jobs.hyperparameters import kinds
from sglang.srt.mezo.service.wire.settings import ServiceSettings, variable
from sglang.srt.mezo.training.arguments import build, read


@dataclass(frozen=True)
class More(MezoConfig):
    patience: int = setting(3, "Evaluations to wait.", at_least=1, at_most=50, job=Bounds(at_most=9), resume="any")


def test_a_setting_that_is_added_at_one_place_is_known_everywhere(capsys):
    with pytest.raises(SystemExit):
        read(["--help"], [More])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--patience N Evaluations to wait. [3; from 1 to 50]" in shown
    assert build([More], read(["--patience", "7"], [More]))[0].patience == 7
    assert kinds(More)["patience"] == (int, Bounds(at_most=9)) and "patience" not in kinds()
    assert ("patience", "a whole number", "3", "from 1 to 50", "Evaluations to wait.") in list(rows(More))
    assert "patience" in names(More, resume="any") and "patience" not in names(More, resume="same")
    assert "patience" in names(More, job=True)


@pytest.mark.parametrize(
    ("value", "allowed"), [(0, "at least 1"), (51, "at most 50"), ("3", "a whole number"), (True, "a whole number")]
)
def test_its_bounds_and_its_type_hold(value, allowed):
    with pytest.raises(ConfigError) as caught:
        More(patience=value)
    assert str(caught.value) == f"patience={value!r} is not allowed: {allowed}"


@pytest.mark.parametrize(
    ("bounds", "within", "outside", "whole"),
    [
        (Bounds(above=0), (1e-300, 5), {0: "a positive number", -1: "a positive number"}, "above 0"),
        (Bounds(above=2), (2.5,), {2: "above 2"}, "above 2"),
        (Bounds(at_least=0), (0, 7), {-1: "zero or more"}, "at least 0"),
        (Bounds(at_least=1, at_most=4), (1, 4), {0: "at least 1", 5: "at most 4"}, "from 1 to 4"),
        (
            Bounds(at_least=0, below=1),
            (0, 0.5),
            {1: "at least 0 and below 1", -0.1: "at least 0 and below 1"},
            "at least 0 and below 1",
        ),
        (Bounds(at_most=3, words="three or fewer"), (3, -8), {4: "three or fewer"}, "three or fewer"),
        (Bounds(), (0, -1e300, 1e300), {}, ""),
    ],
)
def test_a_number_outside_of_bounds_is_told_what_is_allowed(bounds, within, outside, whole):
    assert [bounds.problem(value) for value in within] == [None] * len(within)
    assert {value: bounds.problem(value) for value in outside} == outside
    assert str(bounds) == whole


@pytest.mark.parametrize("bounds", [Bounds(above=0), Bounds(at_least=0), Bounds(at_least=0, below=1)])
def test_what_is_no_number_is_within_no_bounds(bounds):
    assert bounds.problem(float("nan")) is not None


def test_what_must_be_given_and_what_may_be_left_open():
    @dataclass
    class Some:
        needed: str = setting(help="A name.")
        later: float = setting(None, "Settled by the class.", above=0, follows=True)

    require_settings(Some("a"))
    with pytest.raises(ConfigError, match="later=-1 is not allowed: a positive number"):
        require_settings(Some("a", -1))
    with pytest.raises(ConfigError, match="needed=None is not allowed: --needed is needed. A name."):
        build([Some], {})


@pytest.mark.parametrize("rewards", ["module:function", "one=", "=module:function", "a=m:f,a=m:g", "a=m:f,m:g"])
def test_rewards_of_a_server_have_names_of_their_own(rewards):
    def of(text: str) -> ServiceSettings:
        return ServiceSettings.from_environment({variable("rewards"): text})

    assert of("a=m:f, b=n:g").reward_functions == {"a": "m:f", "b": "n:g"} and not of("").reward_functions
    with pytest.raises(ConfigError, match="--mezo-rewards=.* is not allowed: name=module:function with commas between"):
        of(rewards)


def test_the_page_of_settings_is_what_the_classes_say():
    script = Path(__file__).parents[2] / "scripts" / "settings_page.py"
    made = runpy.run_path(str(script))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "python scripts/settings_page.py"
    assert "| `patience` | a whole number | 3 | from 1 to 50 | Evaluations to wait. |" in made["table"](More)

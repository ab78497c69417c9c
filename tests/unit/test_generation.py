from hypothesis import given
from hypothesis import strategies as st

from hybrid.generation import StopText


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    stop, out = StopText(stops), ""
    for piece in pieces:
        text, ended = stop.push(piece)
        out += text
        if ended:
            return out, True
    return out + stop.finish(), False


def test_a_stop_string_split_over_pieces_is_withheld() -> None:
    assert run(("END",), ["one E", "N", "D two"]) == ("one ", True)


def test_what_only_looked_like_one_is_given_back() -> None:
    assert run(("END",), ["one E", "N", "JOY"]) == ("one ENJOY", False)


def test_the_earliest_of_several_wins() -> None:
    assert run(("cd", "b"), ["abcd"]) == ("a", True)


def test_a_control_token_is_all_or_nothing() -> None:
    stop = StopText(("<end", ">n", "middle"))
    assert stop.push("a <") == ("a ", False)
    assert stop.push_control("<|begin|>") == ("<<|begin|>", False)  # nothing is held, nothing reaches across
    assert stop.push("next") == ("next", False)
    assert stop.push_control("<|middle|>") == ("", True)


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3).map(tuple),
)
def test_any_split_gives_the_text_before_the_first_stop(pieces: list[str], stops: tuple[str, ...]) -> None:
    whole, ended = run(stops, pieces)
    text = "".join(pieces)
    # A stop ends the reply as soon as a piece completes it: the earliest start among those found by then.
    seen = ""
    for piece in pieces:
        seen += piece
        found = [seen.find(s) for s in stops if s in seen]
        if found:
            assert (whole, ended) == (seen[: min(found)], True)
            return
    assert (whole, ended) == (text, False)

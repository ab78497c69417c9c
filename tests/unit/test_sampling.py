import numpy as np
import pytest

from hybrid.request import SamplingParams
from hybrid.sampling import Sampler
from offload.errors import HybridError, RequestError

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))


def draw(params: SamplingParams, n: int = 4000, logits: np.ndarray = LOGITS) -> np.ndarray:
    sampler = Sampler(params)
    return np.bincount([sampler.choose(logits)[0] for _ in range(n)], minlength=len(logits)) / n


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler(SamplingParams(temperature=0)).choose(np.array([1, 3, 3, 2], np.float32))[0] == 1


def test_frequencies_follow_the_softmax() -> None:
    np.testing.assert_allclose(draw(SamplingParams(temperature=1, seed=1)), np.exp(LOGITS), atol=0.03)


def test_temperature_sharpens() -> None:
    expected = np.exp(LOGITS * 2) / np.exp(LOGITS * 2).sum()
    np.testing.assert_allclose(draw(SamplingParams(temperature=0.5, seed=2)), expected, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-8, 1e-30, 5e-324])
@pytest.mark.parametrize("peak", [0.0, 20.0, -3e38])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_tiny_temperature_takes_the_peak(temperature: float, peak: float, top_p: float) -> None:
    logits = np.full(5, -3.1e38, np.float32)
    logits[3] = peak
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=1)
    assert draw(params, n=10, logits=logits).tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    logits = LOGITS.copy()
    logits[[0, 3]] = logits[[3, 0]]  # order in the vocabulary must not matter
    frequencies = draw(SamplingParams(temperature=1, top_p=top_p, seed=3), logits=logits)
    order = np.argsort(-logits, kind="stable")
    assert (frequencies[order[:kept]] > 0).all()
    assert frequencies[order[kept:]].sum() == 0


def test_top_p_over_a_large_flat_vocabulary() -> None:
    sampler = Sampler(SamplingParams(temperature=1, top_p=0.5, seed=4))
    logits = np.zeros(10_000, np.float32)
    assert all(sampler.choose(logits)[0] <= 5000 for _ in range(200))


def test_a_seed_means_one_text() -> None:
    def text(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1, seed=seed))
        return [sampler.choose(LOGITS)[0] for _ in range(50)]

    assert text(5) == text(5)
    assert text(5) != text(6)


def test_logprob_is_of_the_unscaled_distribution() -> None:
    sampler = Sampler(SamplingParams(temperature=0.1, top_p=0.5, logprobs=True, seed=1))
    token, logprob = sampler.choose(LOGITS)
    assert token == 0
    assert logprob == pytest.approx(np.log(0.5))


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(HybridError, match="not finite"):
        Sampler(SamplingParams()).choose(np.array([0, np.nan, 1], np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("seed", 2**64),
    ],
)
def test_out_of_bounds_parameters_name_their_field(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field

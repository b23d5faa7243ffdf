import numpy as np
import pytest

from aquatint.diffusion import metrics
from aquatint.diffusion.metrics import Moments, clip_score, cmmd, frechet_distance, moments

RNG = np.random.default_rng(0)


def embeddings(count: int, dims: int = 6) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, dims)).astype(np.float32)


def test_moments_are_the_unbiased_ones():
    rows = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    mean, covariance = moments(rows)
    assert mean.tolist() == [2, 2]
    assert covariance.tolist() == [[4, 3], [3, 3]]
    assert moments(np.array([[1.0], [3.0]])).covariance.tolist() == [[2]]


def test_distance_of_a_set_from_itself_is_zero():
    one = moments(embeddings(50))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert cmmd(embeddings(50), embeddings(50)) == 0


def test_frechet_distance_of_shifted_and_of_commuting_gaussians():
    covariance = np.cov(RNG.normal(size=(40, 3)), rowvar=False)
    shifted = frechet_distance(Moments(np.zeros(3), covariance), Moments(np.array([1.0, -2.0, 2.0]), covariance))
    assert shifted == pytest.approx(9)
    scaled = frechet_distance(Moments(np.zeros(3), covariance), Moments(np.zeros(3), 4 * covariance))
    assert scaled == pytest.approx(np.trace(covariance))  # (1 + 4 - 2 * 2) C


def test_frechet_distance_is_symmetric_and_as_its_definition():
    one, other = moments(embeddings(30)), moments(2 * embeddings(31) + 1)
    product = one.covariance @ other.covariance
    values, vectors = np.linalg.eig(product)
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    expected = ((one.mean - other.mean) ** 2).sum() + np.trace(one.covariance + other.covariance - 2 * root.real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_pictures_than_dimensions_is_finite():
    value = frechet_distance(moments(embeddings(5, 64)), moments(embeddings(6, 64)))
    assert np.isfinite(value)
    assert value > 0


def test_cmmd_is_the_mean_over_all_pairs(monkeypatch):
    x, y = embeddings(13), embeddings(9) + 1

    def mean_kernel(a, b):
        a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a.astype(np.float64), b.astype(np.float64)))
        return np.mean([[np.exp(-((u - v) ** 2).sum() / 200) for v in b] for u in a])

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(metrics, "_BLOCK", 4)
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(5 * x, y) == pytest.approx(expected, rel=1e-6)


def test_clip_score_is_a_hundred_cosines_without_the_negative_ones():
    images = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    texts = np.array([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert clip_score(images, texts) == pytest.approx(100 * (1 + 0.6 + 0) / 3)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan, 1.0]])])
def test_what_is_no_embedding_is_refused(bad):
    for measure in (moments, lambda rows: cmmd(rows, rows), lambda rows: clip_score(rows, rows)):
        with pytest.raises(ValueError, match="finite and of shape"):
            measure(bad)


def test_other_senseless_embeddings_are_refused():
    with pytest.raises(ValueError, match="two embeddings"):
        moments(np.ones((1, 3)))
    with pytest.raises(ValueError, match="no direction"):
        cmmd(np.zeros((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="its text"):
        clip_score(np.ones((2, 3)), np.ones((3, 3)))

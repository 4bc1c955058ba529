"""What TRAK asks of a projector, asked of ours through its interface.

The properties are those that TRAK's own tests name: seeds, norms, products, single features, equal
rows in other batches, orthogonality.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, project_reference
from gradkernels.trak import Projector
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its source holds an escape that Python warns of
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

P, D = 700, 512
TYPES = ("normal", "rademacher", "sjlt")


def projector(proj_type: str = "rademacher", seed: int = 0, d: int = D) -> Projector:
    return Projector(P, d, seed, proj_type, "cpu", 32, dtype=torch.float32, block_size=100)


def rows(count: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, P, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("proj_type", TYPES)
def test_a_seed_and_a_model_are_a_matrix(proj_type: str) -> None:
    x = rows()
    first = projector(proj_type).project(x, 0)
    assert first.shape == (8, D)
    assert first.dtype == torch.float32
    assert torch.equal(first, projector(proj_type).project(x, 0))
    assert not torch.allclose(first, projector(proj_type, seed=1).project(x, 0))
    assert not torch.allclose(first, projector(proj_type).project(x, 1))


@pytest.mark.parametrize("proj_type", TYPES)
def test_norms_and_products_are_kept_as_trak_keeps_them(proj_type: str) -> None:
    """As near as d outputs allow, beside TRAK's own projector held to the same measure."""
    x = rows(40)
    trak = BasicProjector(P, D, 0, ProjectionType.rademacher, torch.device("cpu"))
    exact = x @ x.T
    size = x.norm(dim=1)
    allowed = 6 / D**0.5 * size[:, None] * size[None, :]
    for each in (projector(proj_type), trak):
        found = each.project(x, 0)
        assert ((found @ found.T / D - exact).abs() <= allowed).all()


@pytest.mark.parametrize("proj_type", TYPES)
def test_orthogonal_rows_stay_nearly_so(proj_type: str) -> None:
    x = torch.zeros(2, P)
    x[0, ::2], x[1, 1::2] = 1, 1
    first, second = projector(proj_type).project(x, 0)
    assert torch.cosine_similarity(first, second, dim=0).abs() < 6 / D**0.5


@pytest.mark.parametrize("at", [0, 5, P - 1])
def test_a_single_feature_gives_a_column_of_signs(at: int) -> None:
    x = torch.zeros(1, P)
    x[0, at] = 1
    torch.testing.assert_close(projector().project(x, 0).abs(), torch.ones(1, D))


@pytest.mark.parametrize("proj_type", TYPES)
def test_equal_rows_are_equal_in_any_batch(proj_type: str) -> None:
    x = rows()
    alone = torch.cat([projector(proj_type).project(row[None], 0) for row in x])
    near = {"rtol": 0, "atol": 2e-5 * float(alone.abs().max())}  # rounding
    torch.testing.assert_close(projector(proj_type).project(x, 0), alone, **near)
    torch.testing.assert_close(projector(proj_type).project(x[[3] * 5], 0), alone[[3] * 5], **near)


def test_it_is_the_oracle_times_the_root_of_d() -> None:
    x = rows()
    spec = ProjectionSpec("rademacher", p=P, d=D, seed=3 + 2 * 10_000)
    expected = project_reference(x.double().numpy(), spec) * np.sqrt(D)
    found = projector(seed=3).project(x, 2).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_gradients_by_parameter_are_one_row() -> None:
    x = rows()
    given = {"w": x[:, :600].reshape(8, 20, 30), "b": x[:, 600:699], "scale": x[:, 699]}
    torch.testing.assert_close(projector().project(given, 0), projector().project(x, 0))


@pytest.mark.parametrize("grads", [torch.zeros(2, P - 1), {"w": torch.zeros(2, P - 1)}, {}])
def test_gradients_of_another_length_are_refused(grads: Tensor | dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=rf"not grad_dim={P}"):
        projector().project(grads, 0)


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(ValueError, match="proj_type='uniform' is not one of normal, rademacher"):
        projector("uniform")
    with pytest.raises(ValueError, match="model_id=-1"):
        projector().project(rows(), -1)


def test_a_traker_takes_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With d the rank of all gradients its scores G P (P'G'GP)^-1 P'G' are those of any matrix.

    Up to a factor, which TRAK takes of P'G'GP. The rank of three classes' margins on four
    features and a bias is 2 x 5: classes add up to zero.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
    p = sum(parameter.numel() for parameter in model.parameters())

    def scores(given: object) -> np.ndarray:
        traker = TRAKer(
            model=model, task="image_classification", train_set_size=60, projector=given,
            save_dir=str(tmp_path_factory.mktemp("trak")), device="cpu", proj_dim=10,
            use_half_precision=False, logging_level=50,
        )  # fmt: skip
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(batch=[x, y], num_samples=60)
        traker.finalize_features()
        traker.start_scoring_checkpoint("q", model.state_dict(), model_id=0, num_targets=4)
        traker.score(batch=[x[:4], y[:4]], num_samples=4)
        return np.array(traker.finalize_scores("q"))

    signs, cpu = ProjectionType.rademacher, torch.device("cpu")
    ours = scores(Projector(p, 10, 0, signs, cpu))
    theirs = scores(BasicProjector(p, 10, 0, signs, cpu, block_size=5))
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9999

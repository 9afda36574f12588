"""POA while sampling, against two models and the formula, for every kind of pipeline and criterion."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.sampling import poa
from tests.support.poa_cases import Case, pruned_copy, two_models
from tests.support.tiny_pipelines import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers' Euler with NumPy 2
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),
]

W = 1.7
FAMILIES = ("sd15", "sdxl", "sd3", "flux")
# Of many layers, each of which takes its time.
LARGE = ("sdxl", "refiner", "flux", "chroma", "qwen", "flux2")


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def _disabled(case: Case) -> Iterator[None]:
    yield
    poa.disable(case.pipe)


@pytest.mark.parametrize(
    ("case", "criterion"),
    [
        *product(KINDS, ["magnitude"]),
        ("sd15", "wanda"), ("flux", "wanda:compare=row"), ("sd15", "obs"), ("sd3", "obs"),
    ],
    indirect=["case"],
)  # fmt: skip
def test_it_is_the_formula_of_two_models(criterion: str, case: Case) -> None:
    """Weight 0 is the dense model, 1 the file's; kept weights give the same, a doubled batch up to rounding."""
    kind, pipe, model, baked = case.kind, case.pipe, case.model, case.baked(criterion)
    steps = {"num_inference_steps": 1 if case.name in LARGE else 2}
    other = pruned_copy(model, baked)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = {0.0: kind.run(pipe, 2, **steps)}
    for weight in (1.0, W):
        with two_models(model, other, weight):
            expected[weight] = kind.run(pipe, 2, **steps)
        assert not torch.equal(expected[weight], expected[0])
    for weight, keep in ((0, False), (1, False), (W, False), (W, True)):
        poa.enable(pipe, baked, weight, keep=keep)
        assert torch.equal(kind.run(pipe, 2, **steps), expected[weight])
    if criterion == "magnitude" and case.name in FAMILIES:
        alone = kind.run(pipe, 1, **kind.unguided)
        poa.disable(pipe)
        with two_models(model, other, W):
            assert torch.equal(kind.run(pipe, 1, **kind.unguided), alone)
    names = ("time_embedding", "time_text_embed.timestep_embedder", "distilled_guidance_layer", "time_guidance_embed")
    embedding = next(module for name, module in model.named_modules() if name in names)
    calls: dict[str, list[int]] = {"batched": [], "dense": []}
    for mode, passes in calls.items():
        handle = embedding.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        if mode == "batched":
            poa.enable(pipe, baked, W, mode="batched")
        result = kind.run(pipe, 2, **steps)
        handle.remove()
        if mode == "batched":
            poa.disable(pipe)
            assert torch.allclose(result, expected[W], rtol=1e-3, atol=1e-4 * float(expected[W].abs().max()))
        else:
            assert torch.equal(result, expected[0])
    assert len(calls["batched"]) == len(calls["dense"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(len(m._forward_hooks) or len(m._forward_pre_hooks) for m in model.modules())
    assert not any("forward" in vars(m) or vars(m).get("crdiff_poa") for m in model.modules())


@pytest.mark.parametrize(
    ("case", "criterion"),
    [
        ("sd15", "magnitude"), ("sd15", "wanda:compare=row"), ("sd3", "obs"), ("flux", "random:seed=5"),
    ],
    indirect=["case"],
)  # fmt: skip
def test_a_recipe_and_a_ranking_give_the_result_of_an_export(criterion: str, case: Case) -> None:
    kind, pipe, request = case.kind, case.pipe, case.request(criterion)
    poa.enable(pipe, case.baked(criterion), W)
    expected = kind.run(pipe)
    poa.enable(pipe, poa.from_recipe(request), W)
    assert torch.equal(kind.run(pipe), expected)
    choice = None if criterion == "magnitude" else CriterionChoice.of(criterion, request.calibration)
    plan, other = case.plan(criterion), case.plan(criterion, ratio=0.1)
    ranking = poa.BaseRanking([plan], "base", criterion=choice)
    for wanted in (other, plan, other):
        poa.enable(pipe, ranking.source(wanted, W))
        assert torch.equal(kind.run(pipe), expected) == (wanted is plan)

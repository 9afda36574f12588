"""Gradients of the training loss: against finite differences, against a plain loop, for every kind of pipeline."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crdiff_export import Size
from crdiff_export.calibrate import gradients, runner
from crdiff_export.calibrate import setting as names
from crdiff_export.calibrate.denoise import Denoising
from crdiff_export.calibrate.setting import GRADIENT, LayerSpec, Pass, Setting
from crdiff_export.errors import CalibrationError
from crdiff_export.models.families import by_id
from crdiff_export.progress import Silent
from crdiff_export.sampling.session import Session
from tests.support.calibrating import NATIVE, PROMPTS, SIZE, Tiny, Words, plan_of, setting, speaking, tiny, tokenizer
from tests.support.messages import raises
from tests.support.tiny_pipelines import KINDS, vae

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight"
OTHERS = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", LAYER)
GUIDANCE = 3.5
SMALLEST = 2.0**-149  # of float32, subnormal


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers' Euler with NumPy 2
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),
]


def picture(size: Size, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return coarse.resize((size.width, size.height))


def measured(pipe: Any, wanted: Setting, layers: tuple[str, ...] = OTHERS, count: int = 1) -> dict[str, torch.Tensor]:
    """The statistics of some layers, on pictures that nobody drew."""
    denoising = Denoising(pipe, SIZE, GUIDANCE)
    latents = denoising.encode([picture(NATIVE, number) for number in range(count)])
    embeddings = [denoising.embed(prompt) for prompt, _ in wanted.pairs[:count]]
    examples = [gradients.Example(*pair) for pair in zip(latents, embeddings, strict=True)]
    modules = {name: denoising.model.get_submodule(name.removesuffix(".weight")) for name in layers}
    specs = [LayerSpec(name, len(modules[name].weight), modules[name].weight.shape[1], "") for name in layers]
    step = Pass("gradients", GRADIENT, SIZE)
    return gradients.measure(denoising, wanted, step, examples, specs, modules, Silent())


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype."""
    return float(torch.finfo(dtype).eps) / 2


# --- a plain loop, as training scripts are written ---


def plain_loss(tiny: Tiny, prompt: str, image: Image.Image, moment: float, seed: int) -> torch.Tensor:
    """The loss of one sample with diffusers' own functions, none of ours."""
    pipe, width, height, dtype = tiny.pipe, image.width, image.height, tiny.model.dtype
    with torch.no_grad():
        # Latents are float32 whatever the model's dtype.
        vae = copy.deepcopy(pipe.vae).float()
        latents = vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mode()
        latents = (latents - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        fresh = type(pipe.scheduler).from_config(pipe.scheduler.config)
        if tiny.kind in ("sd15", "sdxl"):
            ddpm = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
            time = torch.tensor([int(moment * 1000)])
            noised = ddpm.add_noise(latents, noise, time)
            kind = pipe.scheduler.config.prediction_type
            target = {
                "epsilon": noise, "sample": latents, "v_prediction": ddpm.get_velocity(latents, noise, time)
            }[kind]  # fmt: skip
        else:
            # The scheduler's table falls from much noise to little.
            number = len(fresh.timesteps) - 1 - int(moment * 1000)
            noised = fresh.scale_noise(latents, fresh.timesteps[number][None], noise)
            time = fresh.sigmas[number][None].to(dtype) * 1000
            target = noise - latents
    noised = noised.to(dtype)
    if tiny.kind == "sd15":
        embeds, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=True)
        predicted = pipe.unet(noised, time, embeds).sample
    elif tiny.kind == "sdxl":
        embeds, _, pooled, _ = pipe.encode_prompt(prompt)
        ids = pipe._get_add_time_ids((height, width), (0, 0), (height, width), dtype, pooled.shape[-1])
        added = {"text_embeds": pooled, "time_ids": ids}
        predicted = pipe.unet(noised, time, embeds, added_cond_kwargs=added).sample
    elif tiny.kind == "sd3":
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None)
        predicted = pipe.transformer(noised, embeds, pooled, time).sample
    else:
        embeds, pooled, text_ids = pipe.encode_prompt(prompt)
        packed = pipe._pack_latents(noised, *noised.shape)
        ids = pipe._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32)
        predicted = pipe.transformer(
            packed, embeds, pooled, time / 1000, ids, text_ids, guidance=torch.tensor([GUIDANCE])
        ).sample
        predicted = pipe._unpack_latents(predicted, height, width, pipe.vae_scale_factor)
    return torch.nn.functional.mse_loss(predicted, target.to(dtype))


# The prefixes of statistics, and the size that each is of.
BOTH = {"": SIZE, "native_": NATIVE}


@pytest.mark.parametrize(
    ("kind", "count", "sizes"), [("sd15", 2, BOTH), ("sdxl", 1, {"": SIZE}), ("sd3", 1, BOTH), ("flux", 1, {"": SIZE})]
)
def test_statistics_are_those_of_a_plain_loop(kind: str, count: int, sizes: dict[str, Size], tmp_path: Path) -> None:
    """In float64: the terms of some gradients nearly cancel, and float32 would leave few correct digits of them."""
    made = tiny(kind, tmp_path)
    made.pipe.to(torch.float64)
    samples = 2
    statistics = [f"{prefix}{name}" for prefix in sizes for name in GRADIENT]
    wanted = setting(*statistics, guidance=GUIDANCE, count=count, samples=samples, steps=1)
    made.collect(tmp_path / "c.safetensors", wanted)
    tensors = load_file(tmp_path / "c.safetensors")
    model, pairs = made.model, wanted.pairs
    style = made.session.style(NATIVE, wanted.steps, wanted.guidance)
    drawn = made.session.draw([prompt for prompt, _ in pairs], [seed for _, seed in pairs], style)
    layers = [name.removeprefix("gradient/") for name in tensors if name.startswith("gradient/")]
    assert len(layers) == len(made.plan.targets)
    for prefix, size in sizes.items():
        sums: dict[str, torch.Tensor] = {}
        for (prompt, seed), image, moments in zip(pairs, drawn, names.times(wanted), strict=True):
            resized = image.resize((size.width, size.height), Image.Resampling.BICUBIC)
            for number, moment in enumerate(moments):
                model.zero_grad()
                torch.autograd.backward(plain_loss(made, prompt, resized, moment, names.noise_seed(seed, number)))
                for layer in layers:
                    gradient = model.get_parameter(layer).grad
                    # A layer whose output nobody uses (SD3's last block) has none.
                    gradient = torch.zeros_like(model.get_parameter(layer)) if gradient is None else gradient
                    for name, part in (
                        ("gradient", gradient), ("gradient_abs", gradient.abs()), ("gradient_square", gradient**2),
                    ):  # fmt: skip
                        key = f"{prefix}{name}/{layer}"
                        sums[key] = sums.get(key, torch.zeros_like(part)) + part / (samples * count)
        for key, expected in sums.items():
            # Roundings to float32: one of g, n - 1 of sums over n samples, one of the mean. A square has that of g
            # twice, and its own. Below the smallest normal number, a rounding is half of the smallest one that exists.
            scale = sums[key.replace("gradient/", "gradient_abs/")]
            bound = (samples * count + 3) * (rounding(torch.float32) * scale + SMALLEST / 2)
            assert bool(((tensors[key].double() - expected).abs() <= bound).all()), key
        assert any(float(expected.abs().max()) > 0 for expected in sums.values())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_target(prediction: str, tmp_path: Path) -> None:
    pipe = speaking("sd15")
    pipe.scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    made = Tiny("sd15", pipe, plan_of(KINDS["sd15"].save(pipe, tmp_path)))
    denoising = Denoising(pipe, NATIVE, GUIDANCE)
    (latents,) = denoising.encode([picture(NATIVE)])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    for moment in (0.0, 0.31, 0.999):
        with torch.no_grad():
            loss = denoising.loss(latents, denoising.embed(PROMPTS[0]), moment, noise)
            expected = plain_loss(made, PROMPTS[0], picture(NATIVE), moment, 5)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def latents_of(pipe: Any, image: Image.Image) -> torch.Tensor:
    """What a pipeline makes of a picture that is not noise."""
    vae, pixels = pipe.vae, pipe.image_processor.preprocess(image)
    if isinstance(pipe, diffusers.Flux2Pipeline):
        latents: torch.Tensor = pipe._encode_vae_image(pixels, torch.Generator())
        return latents
    if isinstance(pipe, diffusers.QwenImagePipeline):
        editing = diffusers.QwenImageEditPipeline(**pipe.components, processor=None)
        edited: torch.Tensor = editing._encode_vae_image(pixels.unsqueeze(2), torch.Generator())
        return edited[:, :, 0]
    plain: torch.Tensor = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    return plain


@pytest.mark.parametrize("kind", ["chroma", "qwen", "flux2", "lumina2"])
def test_a_flow_is_told_what_its_pipeline_tells_it(kind: str) -> None:
    """The loss of the first step of a picture, whose noise the pipeline is given: mean of (e - x - prediction) ** 2."""
    pipe = lumina2() if kind == "lumina2" else speaking(kind)
    pipe.set_progress_bar_config(disable=True)
    image, short = picture(NATIVE), {"max_sequence_length": 32}
    denoising = Denoising(pipe, NATIVE, GUIDANCE, short)
    with torch.no_grad():
        latents, expected = denoising.encode([image])[0], latents_of(pipe, image)
    torch.testing.assert_close(latents, expected)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step(prediction: torch.Tensor, _time: Any, sample: torch.Tensor, **_: Any) -> Any:
        seen.append((prediction, sample))
        return (sample,)

    pipe.scheduler.step = step
    guidance = {"guidance_scale": GUIDANCE if kind == "flux2" else 1.0}
    sizes = {"width": NATIVE.width, "height": NATIVE.height}
    pipe(prompt=PROMPTS[0], num_inference_steps=1, output_type="latent", **guidance, **sizes, **short)
    del pipe.scheduler.step
    ((prediction, noise),) = seen  # at sigma 1 the sample is the noise alone
    if noise.ndim == 3:
        side = 1 if kind == "flux2" else 2
        _, channels, height, width = latents.shape

        def unpacked(tokens: torch.Tensor) -> torch.Tensor:
            rows = tokens.view(1, height // side, width // side, channels, side, side)
            return rows.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

        prediction, noise = unpacked(prediction), unpacked(noise)
    with torch.no_grad():
        loss = denoising.loss(latents, denoising.embed(PROMPTS[0]), 1 - 1e-9, noise)
    error = (noise - latents - prediction).double()
    assert float(loss) == pytest.approx(float(error.square().mean()), rel=1e-4)


def test_an_autoencoder_without_a_distribution() -> None:
    """SANA's."""
    pipe = lumina2()
    types = {"encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2}
    sizes = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    pipe.vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, scaling_factor=0.41, downsample_block_type="conv", **types, **sizes, **layers
    )
    image = picture(NATIVE)
    (latents,) = Denoising(pipe, NATIVE, GUIDANCE).encode([image])
    with torch.no_grad():
        expected = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent * 0.41
    torch.testing.assert_close(latents, expected)


def lumina2() -> Any:
    """A pipeline whose time runs from noise to picture, and which negates the prediction."""
    torch.manual_seed(0)
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, hidden_size=8, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        axes_dim_rope=(2, 2), axes_lens=(64, 64), cap_feat_dim=8, multiple_of=4,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=model, vae=vae(16), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=Words(8),
        tokenizer=tokenizer(),
    )  # fmt: skip


def test_sd3_is_told_the_time_of_its_noise() -> None:
    """As its pipeline tells it, in float32: bf16 has 8 bits, and 987.3 would be 988."""
    dtype = torch.bfloat16
    pipe = speaking("sd3").to(dtype)
    table = pipe.scheduler.timesteps  # of the training, from much noise to little
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], kwargs["timestep"]))

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    denoising = Denoising(pipe, NATIVE, GUIDANCE)
    (latents,) = denoising.encode([picture(NATIVE)])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    embeds = denoising.embed(PROMPTS[0])
    for moment in (0.123, 0.5, 0.9873):
        with torch.no_grad():
            denoising.loss(latents, embeds, moment, noise)
        sample, time = calls.pop()
        right = table[999 - int(moment * 1000)]
        assert (time.dtype, time.tolist()) == (torch.float32, [pytest.approx(right.item(), rel=1e-6)])
        torch.testing.assert_close(sample, torch.lerp(latents, noise, right.item() / 1000).to(dtype))
    pipe(PROMPTS[0], height=64, width=64, num_inference_steps=1, output_type="latent")
    assert calls.pop()[1].dtype == torch.float32


# --- times and noise ---


def test_times_are_spread_evenly() -> None:
    wanted = Setting(SIZE, NATIVE, GRADIENT, tuple((str(i), i) for i in range(40)), samples=5)
    times = names.times(wanted)
    assert len(times) == 40
    for moments in times:
        assert [int(moment * 5) for moment in moments] == [0, 1, 2, 3, 4]
    everything = sorted(moment for moments in times for moment in moments)
    gaps = np.diff([0, *everything, 1])
    assert max(gaps) < 2.7 / len(everything)  # the three-gap theorem: at most the golden ratio's square
    assert names.times(wanted) == times
    other = Setting(SIZE, NATIVE, GRADIENT, tuple((str(i), i + 1) for i in range(40)), samples=5)
    assert names.times(other) != times


def test_every_sample_has_its_own_noise() -> None:
    seeds = {names.noise_seed(seed, number) for seed in range(100) for number in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- what is left as it was, and what does not matter ---


def test_the_model_is_left_as_it_was() -> None:
    pipe = speaking("sd15")
    pipe.unet.conv_in.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in pipe.unet.named_parameters()}
    measured(pipe, setting(*GRADIENT, count=1))
    for name, parameter in pipe.unet.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert not pipe.unet.is_gradient_checkpointing


def test_the_vae_works_in_float32_and_goes_back(caplog: pytest.LogCaptureFixture) -> None:
    pipe, half = speaking("sd15"), speaking("sd15")
    half.vae.half()
    with torch.no_grad():
        for parameter, whole in zip(half.vae.parameters(), pipe.vae.parameters(), strict=True):
            whole.copy_(parameter.float())
    result = [Denoising(one, SIZE, GUIDANCE).encode([picture(NATIVE)])[0] for one in (pipe, half)]
    assert torch.equal(*result)
    assert half.vae.dtype == torch.float16


def test_means_take_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    zeros = torch.zeros

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(zeros(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", recorded)
    result = measured(speaking("sd15"), setting("gradient", count=1))
    assert {id(tensor) for tensor in result.values()} <= {id(tensor) for tensor in made}


def test_half_precision_is_near() -> None:
    """The error is that of float32 times the ratio of the dtypes' rounding errors.

    Many gradients are too small for fp16. They would become zeros if the loss were not multiplied first.
    """
    wanted = setting(*GRADIENT, count=1)
    result = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        pipe = speaking("sd15")
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(2.0**-10)  # makes the gradients of all other layers as much smaller
        pipe.unet.to(dtype)
        pipe.text_encoder.to(dtype)
        linear = [name for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Linear)]
        layers = tuple(f"{name}.weight" for name in linear if "transformer_blocks" in name)
        result[dtype] = measured(pipe, wanted, layers)
    exact = result.pop(torch.float64)
    for name in GRADIENT:
        keys = [f"{name}/{layer}" for layer in layers]
        # Relative to each layer's norm, so that all layers count alike.
        errors = {
            dtype: torch.stack([(sums[key] - exact[key]).norm() / exact[key].norm() for key in keys]).norm()
            for dtype, sums in result.items()
        }
        for dtype in (torch.float16, torch.bfloat16):
            # Both are sums of many random rounding errors; the factor 4 leaves room for chance.
            assert errors[dtype] < 4 * errors[torch.float32] * rounding(dtype) / rounding(torch.float32)


def test_a_gradient_too_large_for_fp16_is_taken_again() -> None:
    pipe = speaking("sd15")
    pipe.unet.half()
    pipe.text_encoder.half()
    denoising = Denoising(pipe, NATIVE, GUIDANCE)
    (latents,) = denoising.encode([picture(NATIVE)])
    example = gradients.Example(latents * 30, denoising.embed(PROMPTS[0]))
    noise = 30 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    weight = pipe.unet.get_parameter("conv_out.weight")
    loss = denoising.loss(example.latents, example.call, 0.5, noise)
    (raw,) = torch.autograd.grad(loss * gradients.SCALES[0], [weight])
    assert not raw.isfinite().all()
    (result,) = gradients._gradients(denoising, example, 0.5, noise, [weight])
    assert result.isfinite().all()
    assert result.abs().max() > 0


# --- what cannot be ---


def _scheduled(pipe: Any, scheduler: Any) -> Any:
    pipe.scheduler = scheduler
    return pipe


def _lcm(pipe: Any) -> Any:
    pipe.unet = KINDS["sd15"].model.func(768, time_cond_proj_dim=8)  # type: ignore[attr-defined]
    return pipe


REFUSED = {
    "edm": ("sd15", lambda pipe: _scheduled(pipe, diffusers.EDMEulerScheduler()), "EDMEulerScheduler"),
    "flow-prediction": (
        "sd15", lambda pipe: _scheduled(pipe, diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")),
        "DPMSolverMultistepScheduler",
    ),
    "no-flow": ("sd3", lambda pipe: _scheduled(pipe, diffusers.DDIMScheduler()), "DDIMScheduler"),
    "lcm": ("sd15", _lcm, "LCM"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "key"), REFUSED.values(), ids=REFUSED)
def test_pipelines_without_a_known_loss_are_refused(kind: str, change: Callable[[Any], Any], key: str) -> None:
    with raises(CalibrationError, key):
        Denoising(change(speaking(kind)), SIZE, GUIDANCE)


@pytest.mark.parametrize(
    ("calls", "told", "scale", "known"),
    [
        (1, 0.25, 1, True),
        (1, 0.75, -1, True),
        (0, 0.25, 1, False),
        (2, 0.25, 1, False),
        (1, 0.4, 1, False),
        (1, 0.25, 2, False),
    ],
    ids=["plain", "reverse", "no step", "two calls", "another time", "another prediction"],
)
def test_a_pipeline_that_calls_its_model_in_another_way_is_refused(
    calls: int, told: float, scale: float, known: bool
) -> None:
    pipe = lumina2()

    class Calling(SimpleNamespace):
        def __call__(self, **_: Any) -> None:
            latents, time = torch.randn(1, 16, 8, 8), torch.tensor([told])
            text = {"encoder_hidden_states": torch.randn(1, 4, 8), "encoder_attention_mask": torch.ones(1, 4).bool()}
            with torch.no_grad():
                outputs = [self.transformer(latents, timestep=time, return_dict=False, **text)[0] for _ in range(calls)]
            if outputs:
                self.scheduler.step(scale * outputs[0], torch.tensor(250.0), latents)

    denoising = Denoising(Calling(transformer=pipe.transformer, scheduler=pipe.scheduler), NATIVE, GUIDANCE)
    if known:
        call = denoising.embed(PROMPTS[0])
        assert (call.fraction, call.reverse, call.negated) == (True, told > 0.5, scale < 0)
        assert sorted(call.arguments) == ["encoder_attention_mask", "encoder_hidden_states"]
    else:
        with raises(CalibrationError, "Calling"):
            denoising.embed(PROMPTS[0])


@pytest.mark.parametrize(
    ("statistic", "dtype"),
    [("norm", torch.bfloat16), ("norm", torch.float32), ("gradient_square", torch.float16)],
)
def test_numbers_that_are_not_finite(statistic: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = tiny("sd15", tmp_path)
    made.pipe.to(dtype)
    with torch.no_grad():
        made.pipe.unet.conv_in.weight[0, 0, 0, 0] = float("inf")
    layer, name = "down_blocks.0.attentions.0.transformer_blocks.0.", str(dtype).removeprefix("torch.")
    with raises(CalibrationError, layer, name), np.errstate(invalid="ignore"):
        made.collect(tmp_path / "c.safetensors", setting(statistic, count=1, steps=1, samples=1))
    assert not (tmp_path / "c.safetensors").exists()


def test_a_session_of_another_model(tmp_path: Path) -> None:
    made = tiny("sd15", tmp_path)
    other = Session(speaking("sd3"), by_id("sd3-medium").pipelines[""])
    with raises(CalibrationError, "SD3Transformer2DModel", "down_blocks"):
        runner.collect(other, made.plan, setting("norm"), tmp_path / "c.safetensors", base="x")
    assert not (tmp_path / "c.safetensors.part").exists()

"""Networks built from configs, the numbers in them, and folders that are read in their place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from executors.models import (
    Conditioning,
    build_text_encoder,
    build_unet,
    build_vae,
    decode,
    fill,
    load_pipeline,
    replica,
    seeded_conditioning,
    seeded_latents,
    token_ids,
)
from executors.models.encoders import FIRST_TOKEN, LAST_TOKEN
from executors.parallel.denoiser import predict_noise
from hybridsd_sim.errors import InputError
from hybridsd_sim.perf import unet_layers, unet_params
from small_models import HEIGHT_PX, SMALL, SMALLER, WIDTH_PX

PRUNED = {**SMALL, "resnet_inner_channels": [32] * 7 + [64], "self_attention_heads": [1, 2, 2, 3]}
SMALL_XL = {
    **SMALL,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "use_linear_projection": True,
}
PUBLISHED = {
    "sd15": 859_520_964,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "bk-sdm-tiny": 323_384_964,
    "hybrid-sd-224m": 224_492_676,
}
"""Parameters of the released checkpoints."""


def params(module: torch.nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())


def noise(unet: UNet2DConditionModel, conditioning: Conditioning | None = None, **size: int) -> torch.Tensor:
    """The noise of both branches for one seeded latent at step 500."""
    latents = seeded_latents(unet, images=1, **(size or {"height_px": HEIGHT_PX, "width_px": WIDTH_PX}))
    with torch.inference_mode():
        return predict_noise(unet, latents, torch.tensor(500), conditioning or seeded_conditioning(unet))


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two modules hold the same parameters to the bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- UNets ----


def test_every_catalogue_model_has_its_published_parameters(profiles):
    """Every model of the catalogue, built as a real network, has the number of parameters that the catalogue gives."""
    counts = {name: params(build_unet(row.config, device="meta")) for name, row in profiles.models.items()}
    assert counts == {name: row.params for name, row in profiles.models.items()}
    assert counts.items() >= PUBLISHED.items()


def test_a_pruned_unet_runs_with_the_layers_that_are_counted():
    """A pruned config becomes narrower resnets and fewer self-attention heads, and the network runs."""
    unet = build_unet(PRUNED)
    assert params(unet) == unet_params(PRUNED) < unet_params(SMALL)
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    attention = "up_blocks.1.attentions.1.transformer_blocks.0.attn1"
    assert shapes["up_blocks.1.resnets.0.conv2.weight"] == (64, 32, 3, 3)
    assert shapes[f"{attention}.to_k.weight"] == (3 * 16, 64)
    assert unet.get_submodule(attention).heads == 3
    assert noise(unet).isfinite().all()


def test_the_config_of_a_unet_still_describes_it():
    """`dict(unet.config)` counts as the config did, the fields of pruned models included."""
    unet = build_unet(PRUNED, device="meta")
    plain_config = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
    assert unet_layers(plain_config, HEIGHT_PX, WIDTH_PX) == unet_layers(PRUNED, HEIGHT_PX, WIDTH_PX)


@pytest.mark.parametrize("config", [SMALL, SMALLER, SMALL_XL], ids=["small", "smaller", "small-xl"])
def test_seeded_networks_keep_activations_of_order_one(config):
    """The noise of a seeded network is finite, neither vanishing nor exploding."""
    spread = noise(build_unet(config)).std().item()
    assert 0.2 < spread < 5


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    """Weights follow from the seed alone, whatever else drew random numbers before."""
    first = build_unet(SMALL, seed=3)
    torch.rand(5)
    assert same(first, build_unet(SMALL, seed=3))
    assert not same(first, build_unet(SMALL, seed=4))


def test_building_moves_no_other_generator():
    """Building and seeding draw nothing from torch's own generator."""
    before = torch.get_rng_state()
    unet = build_unet(SMALL)
    noise(unet)
    assert torch.equal(before, torch.get_rng_state())


def test_every_precision_holds_the_same_numbers():
    """Half-precision weights are the float32 ones, rounded."""
    assert same(build_unet(SMALL).to(torch.bfloat16), build_unet(SMALL, dtype=torch.bfloat16))


def test_no_bias_is_zero_and_nothing_learns():
    """Biases are not 0, so that a wrong edge shows; the network is for evaluation only."""
    unet = build_unet(SMALL)
    assert all(parameter.count_nonzero() == parameter.numel() for parameter in unet.parameters())
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())


REFUSED = {
    "norm_num_groups": ({**SMALL, "norm_num_groups": 16}, "config.norm_num_groups: 16"),
    "block type": ({**SMALL, "down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "config.down_block_types"),
    "unknown field": ({**SMALL, "chanels": 3}, "config.chanels: 3; no such field"),
    "time width": ({**SMALL_XL, "addition_time_embed_dim": 16}, "config.addition_time_embed_dim: 16"),
    "activation": ({**SMALL, "act_fn": "step"}, "diffusers refuses it"),
}


@pytest.mark.parametrize(("config", "said"), REFUSED.values(), ids=REFUSED)
def test_unsupported_parts_are_refused_with_a_reason(config, said):
    """A config that cannot be counted or built is refused, naming the field and the rule."""
    with pytest.raises(InputError) as refusal:
        build_unet(config, device="meta")
    assert said in str(refusal.value)


# ---- Replicas ----


class Doubling(ModelHook):
    """Doubles what a module returns."""

    def post_forward(self, module, output):
        return output * 2


def test_a_replica_shares_weights_but_not_hooks():
    """A replica is another module tree over the very same parameters; a hook on it leaves the original alone."""
    unet = build_unet(SMALL)
    before = noise(unet)
    copy = replica(unet)
    pairs = zip(unet.parameters(), copy.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    HookRegistry.check_if_exists_or_initialize(copy.conv_out).register_hook(Doubling(), "doubling")
    assert torch.equal(noise(unet), before)
    assert torch.equal(noise(copy), 2 * before)
    with pytest.raises(ValueError, match=r"hooked: conv_out"):
        replica(copy)


# ---- Inputs ----


def test_conditioning_has_the_widths_of_the_unet():
    """Seeded conditioning has both branches, 77 tokens of the UNet's width, and what SDXL adds."""
    conditioning = seeded_conditioning(build_unet(SMALL_XL, device="cpu"), images=3)
    assert conditioning.embeds.shape == (6, 77, 16)
    assert conditioning.added["text_embeds"].shape == (6, 64 - 6 * 8)
    assert conditioning.added["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 6
    assert seeded_conditioning(build_unet(SMALL), guidance_scale=1.0).embeds.shape == (1, 77, 16)


def test_latents_are_seeded_and_of_the_size_asked_for():
    """Seeded latents are standard normal float32 at an eighth of the pixels, and sizes that do not fit are refused."""
    unet = build_unet(SMALL, dtype=torch.bfloat16)
    latents = seeded_latents(unet, images=2, height_px=HEIGHT_PX, width_px=WIDTH_PX, seed=1)
    assert latents.shape == (2, 4, 24, 8)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, seeded_latents(unet, images=2, height_px=HEIGHT_PX, width_px=WIDTH_PX, seed=1))
    assert not torch.equal(latents, seeded_latents(unet, images=2, height_px=HEIGHT_PX, width_px=WIDTH_PX, seed=2))
    with pytest.raises(InputError, match="height_px: 200"):
        seeded_latents(unet, images=1, height_px=200, width_px=64)


# ---- Text and images ----


@pytest.mark.parametrize(
    ("name", "count"), [("clip-l", 123_060_480), ("openclip-h", 340_387_840), ("openclip-bigg", 694_659_840)]
)
def test_text_encoders_have_their_published_parameters(name, count):
    """Every text encoder has the parameters of the released one."""
    assert params(build_text_encoder(name, device="meta")) == count


@given(prompt=st.text(min_size=1, max_size=40))
@settings(max_examples=20)
def test_without_a_tokenizer_prompts_become_seeded_ids(prompt):
    """Ids follow from the prompt's text, stand between CLIP's marks, and the empty prompt is all padding."""
    ids, empty = token_ids([prompt, ""])
    assert ids.shape == (77,)
    assert (ids[0], ids[-1]) == (empty[0], empty[1]) == (FIRST_TOKEN, LAST_TOKEN)
    assert ids[1:-1].max() < FIRST_TOKEN
    assert set(empty[1:].tolist()) == {LAST_TOKEN}
    assert torch.equal(ids, token_ids([prompt])[0])
    assert not torch.equal(ids, token_ids([f"{prompt}."])[0])


@pytest.mark.parametrize(("name", "scale"), [("autoencoder-kl", 0.18215), ("taesd", 1.0)])
def test_autoencoders_decode_eight_pixels_from_each_latent(name, scale):
    """A latent becomes an image eight times as high and wide, after the autoencoder's own scaling."""
    vae = build_vae(name)
    latents = torch.randn((1, 4, 2, 4), generator=torch.Generator().manual_seed(0))
    images = decode(vae, latents)
    assert images.shape == (1, 3, 16, 32)
    assert images.isfinite().all()
    with torch.inference_mode():
        assert torch.equal(images, vae.decode(latents / scale).sample)


def test_sdxl_has_its_own_latent_scale(profiles):
    """Latents of SDXL are scaled by 0.13025, those of Stable Diffusion 1 and 2 by 0.18215."""
    scales = {
        name: load_pipeline(name, device="meta", profiles=profiles).vae.config.scaling_factor
        for name in ("sd21", "sdxl")
    }
    assert scales == {"sd21": 0.18215, "sdxl": 0.13025}


def test_unknown_names_are_refused_with_the_nearest(profiles):
    """An unknown model, encoder or autoencoder is refused with names that exist."""
    with pytest.raises(InputError, match="sd15"):
        load_pipeline("sd-15", profiles=profiles)
    with pytest.raises(InputError, match="clip-l"):
        build_text_encoder("clip-xl")
    with pytest.raises(InputError, match="taesd"):
        build_vae("taesdxl")


# ---- A folder of weights ----


def small_vae(*, seed: int) -> AutoencoderKL:
    """An autoencoder of one level."""
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, scaling_factor=0.5)
    return fill(vae, seed=seed, device="cpu", dtype=torch.float32)


def small_clip(kind: Callable[[CLIPTextConfig], Any], *, seed: int) -> Any:
    """A text encoder of two layers."""
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=16
    )
    with torch.device("meta"):
        encoder = kind(config)
    return fill(encoder, seed=seed, device="cpu", dtype=torch.float32)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that knows the letters a and b."""
    folder.mkdir()
    words = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "<|startoftext|>": FIRST_TOKEN, "<|endoftext|>": LAST_TOKEN}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}), encoding="utf-8")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A whole pipeline folder of SDXL's kind, written by diffusers and transformers."""
    folder = tmp_path_factory.mktemp("weights") / "small-xl"
    build_unet(SMALL_XL, seed=11).save_pretrained(folder / "unet")
    small_vae(seed=12).save_pretrained(folder / "vae")
    small_clip(CLIPTextModel, seed=13).save_pretrained(folder / "text_encoder")
    small_clip(CLIPTextModelWithProjection, seed=14).save_pretrained(folder / "text_encoder_2")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2")
    (folder / "scheduler").mkdir()
    said = json.dumps({"prediction_type": "v_prediction"})
    (folder / "scheduler" / "scheduler_config.json").write_text(said, encoding="utf-8")
    return folder


def test_a_folder_of_weights_gives_the_same_outputs_to_the_bit(pipeline):
    """A UNet and an autoencoder saved by diffusers come back as the networks that were saved, by name of the folder."""
    before = torch.get_rng_state()
    model = load_pipeline(str(pipeline), weights=pipeline)
    assert (model.name, model.prediction) == ("small-xl", "v")
    assert torch.equal(noise(model.unet), noise(build_unet(SMALL_XL, seed=11)))
    latents = torch.ones(1, 4, 4, 4)
    assert torch.equal(decode(model.vae, latents), decode(small_vae(seed=12), latents))
    assert torch.equal(before, torch.get_rng_state())


def test_a_folder_reads_prompts_with_its_own_tokenizers(pipeline):
    """Two encoders give their last states but one side by side, and the second's projection, as SDXL wants them."""
    model = load_pipeline(str(pipeline), weights=pipeline)
    conditioning = model.encode(["a b"], height_px=64, width_px=128)
    ids = torch.tensor([[FIRST_TOKEN, 2, 3, *[LAST_TOKEN] * 74]])
    assert torch.equal(token_ids(["a b"], model.tokenizers[0]), ids)
    with torch.inference_mode():
        states = [
            small_clip(kind, seed=seed)(ids, output_hidden_states=True)
            for kind, seed in ((CLIPTextModel, 13), (CLIPTextModelWithProjection, 14))
        ]
    wanted = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
    assert torch.equal(conditioning.embeds, torch.cat([torch.zeros_like(wanted), wanted]))
    torch.testing.assert_close(conditioning.added["text_embeds"][1:], states[1].text_embeds)
    assert conditioning.added["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]] * 2
    assert noise(model.unet, conditioning).isfinite().all()


def test_a_pruned_unet_can_be_saved_and_loaded(tmp_path):
    """A pruned network, which diffusers alone cannot load, comes back from its folder."""
    build_unet(PRUNED, seed=5).save_pretrained(tmp_path / "unet")
    model = load_pipeline(str(tmp_path / "unet" / "config.json"), weights=tmp_path)
    assert same(model.unet, build_unet(PRUNED, seed=5))
    assert model.name == tmp_path.name


def test_any_config_file_is_a_model(tmp_path):
    """A config.json alone, plain or pruned, is built with seeded weights under its own name."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(PRUNED), encoding="utf-8")
    model = load_pipeline(str(path), seed=2)
    assert model.name == "mine"
    assert same(model.unet, build_unet(PRUNED, seed=2))
    with pytest.raises(InputError, match="no text encoder of this width"):
        _ = model.text_encoders


def test_the_tiny_autoencoder_of_a_folder_is_known_by_its_class(tmp_path):
    """The folder's config says which autoencoder it holds, and other classes are refused."""
    build_unet(SMALL).save_pretrained(tmp_path / "unet")
    build_vae("taesd", seed=1).save_pretrained(tmp_path / "vae")
    model = load_pipeline(str(tmp_path), weights=tmp_path)
    assert isinstance(model.vae, AutoencoderTiny)
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "VQModel"}', encoding="utf-8")
    with pytest.raises(InputError, match="VQModel"):
        _ = load_pipeline(str(tmp_path), weights=tmp_path).vae


def _cut_short(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _lose_a_tensor(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, {"format": "pt"})


BROKEN = {
    "no file": (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded"),
    "cut short": (_cut_short, "cannot be loaded"),
    "a tensor is gone": (_lose_a_tensor, "conv_in.weight"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no such file"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"), "not readable as JSON"),
}


@pytest.mark.parametrize("config", [SMALL, PRUNED], ids=["plain", "pruned"])
@pytest.mark.parametrize(("harm", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_weights_are_refused(tmp_path, config, harm, said):
    """A folder whose files are missing, cut short or incomplete is refused with its name, never filled up silently."""
    build_unet(config).save_pretrained(tmp_path / "unet")
    harm(tmp_path / "unet")
    with pytest.raises(InputError) as refusal:
        _ = load_pipeline(str(tmp_path), weights=tmp_path).unet
    assert said in str(refusal.value)
    assert str(tmp_path / "unet") in str(refusal.value)


def test_a_missing_part_is_refused_when_it_is_asked_for(tmp_path):
    """A folder with a UNet alone serves for the UNet; what else it lacks is named when it is needed."""
    build_unet(SMALL, seed=9).save_pretrained(tmp_path / "unet")
    model = load_pipeline(str(tmp_path), weights=tmp_path)
    assert same(model.unet, build_unet(SMALL, seed=9))
    for part in ("vae", "text_encoders", "tokenizers"):
        with pytest.raises(InputError, match=f"{part.rstrip('s')}"):
            getattr(model, part)


def test_weights_of_another_network_are_refused(tmp_path, profiles):
    """A folder cannot pass for a model that it does not hold."""
    build_unet(SMALL).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match=rf"{unet_params(SMALL):,} parameters in other layers than sd15"):
        load_pipeline("sd15", weights=tmp_path, profiles=profiles)

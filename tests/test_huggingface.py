"""transformers, accelerate and peft: small models with random weights, replaced, fused, frozen, trained and saved."""

import copy
import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch
from compare import close
from training import assert_trained_alike

import fastops

missing = [name for name in ("transformers", "accelerate", "peft") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{', '.join(missing)} not installed: pip install fastops[huggingface]"
)

if not missing:
    from transformers import activations, pytorch_utils

EXAMPLE = Path(__file__).parent.parent / "examples" / "huggingface.py"
VOCABULARY = 64


def _config(name, **options):
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, **options}
    if name != "ViT":
        sizes |= {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, f"{name}Config")(**sizes)


def bert():
    import transformers

    return transformers.BertForSequenceClassification(_config("Bert", intermediate_size=64, num_labels=3))


def gpt2():
    import transformers

    return transformers.GPT2LMHeadModel(_config("GPT2", n_positions=16))


def vit():
    import transformers

    return transformers.ViTForImageClassification(_config("ViT", intermediate_size=64, image_size=8, patch_size=4))


def llama():
    import transformers

    return transformers.LlamaForCausalLM(_config("Llama", intermediate_size=64, num_key_value_heads=1))


MODELS = [bert, gpt2, vit, llama]
# How many layers replace_ takes, and the layers that freeze packs.
REPLACED = {bert: 22, gpt2: 16, vit: 21, llama: 17}
FROZEN = {bert: 14, gpt2: 7, vit: 12, llama: 15}


def batch(model, count=4):
    """Inputs by name, with a target."""
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(count, 3, 8, 8), "labels": torch.randint(0, 2, (count,))}
    ids = torch.randint(3, VOCABULARY, (count, 8))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = torch.randint(0, 3, (count,)) if "Classification" in type(model).__name__ else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model, steps=3):
    """The losses of a few steps."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", MODELS)
def test_replaced_trained_and_saved(make, tmp_path):
    model = make()
    plain = copy.deepcopy(model)
    report = fastops.replace_(model)
    assert (len(report.replaced), report.skipped) == (REPLACED[make], [])
    assert train(model) == pytest.approx(train(plain), rel=1e-5)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.eval()
    plain.eval()
    inputs = batch(model)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)  # by plain transformers
    assert type(loaded) is type(plain)
    torch.testing.assert_close(loaded.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    fastops.restore_(model)
    assert [type(one) for one in model.modules()] == [type(one) for one in plain.modules()]
    torch.testing.assert_close(model(**inputs).logits, loaded(**inputs).logits, rtol=0, atol=0)


def t5():
    import transformers

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes))
    return model, {"input_ids": torch.randint(3, VOCABULARY, (2, 8)), "labels": torch.randint(3, VOCABULARY, (2, 8))}


def whisper():
    import transformers

    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, VOCABULARY, (2, 8))}


def clip():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4})
    ids = torch.randint(3, VOCABULARY, (2, 8))
    return transformers.CLIPModel(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 8, 8),
        "return_loss": True,
    }


def swin():
    import transformers

    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    model = transformers.SwinForImageClassification(transformers.SwinConfig(image_size=8, patch_size=2, **sizes))
    return model, {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize(("make", "replaced"), [(t5, 19), (whisper, 28), (clip, 22), (swin, 25)])
def test_other_architectures(make, replaced, tmp_path):
    """Two stacks, convolutions over sound, two towers, windows: a step as with PyTorch, saved and loaded by it."""
    plain, inputs = make()
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert len(fastops.replace_(ours).replaced) == replaced
    for model in (plain, ours, exact):
        kind = next(model.parameters()).dtype
        own = {k: v.to(kind) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        torch.manual_seed(1)  # dropout
        model(**own).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_trained_alike(ours, plain, exact)
    ours.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    for p, q in zip(loaded.parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("make", MODELS)
def test_fused_and_frozen(make):
    """The parts that torch.fx cannot trace are called as they are, and what they consist of is fused and frozen."""
    model = make().eval()
    inputs = batch(model)
    expected = model(**inputs)
    fused, frozen = fastops.fuse(model), fastops.freeze(model)
    assert len(fused.fastops_report.fused) >= 2
    assert len(frozen.fastops_report.frozen) == FROZEN[make]
    with torch.no_grad(), fastops.record() as calls:
        got = frozen(**inputs)
    assert not any(row.kernel == "aten" for row in calls if row.op == "linear")
    for output in (fused(**inputs), got):
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-5)
    expected = train(copy.deepcopy(model))
    assert train(fused) == pytest.approx(expected, rel=1e-5)  # of model's parameters


def test_frozen_without_labels_and_with_other_shapes():
    """Calls that are not the ones a graph was made for."""
    model = gpt2().eval()
    frozen = fastops.freeze(model)
    with torch.no_grad():
        for count in (1, 3):
            ids = torch.randint(3, VOCABULARY, (count, 5))
            expected, got = model(ids, use_cache=True), frozen(ids, use_cache=True)
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
            # One token more, with the keys and values of those before.
            more = ids[:, -1:]
            expected = model(more, past_key_values=expected.past_key_values)
            got = frozen(more, past_key_values=got.past_key_values)
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_attention_under_enable():
    """transformers calls attention as a function; enable() covers what neither replace_ nor freeze sees."""
    model = gpt2().eval()
    frozen, inputs = fastops.freeze(model), batch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        with fastops.enabled(), fastops.record() as calls:
            torch.testing.assert_close(frozen(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    attention = [row.kernel for row in calls if row.op == "scaled_dot_product_attention"]
    assert len(attention) == 2
    assert "aten" not in attention


def test_generation():
    model = llama().eval()
    ids = torch.randint(3, VOCABULARY, (2, 4))
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    with fastops.replaced(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


# ---- layers ----------------------------------------------------------------------------------------------------------


def layers():
    return {
        "Conv1D": pytorch_utils.Conv1D(12, 7),
        "NewGELUActivation": activations.NewGELUActivation(),
        "GELUActivation": activations.GELUActivation(),
        "GELUActivation in Python": activations.GELUActivation(use_gelu_python=True),
        "GELUTanh": activations.GELUTanh(),
        "GELUTanh in Python": activations.GELUTanh(use_gelu_tanh_python=True),
        "SiLUActivation": activations.SiLUActivation(),
        "MishActivation": activations.MishActivation(),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layers(dtype):
    """Values and gradients, by the rule of every op: twice the error of what transformers computes, and a rounding."""
    for name, theirs in layers().items():
        x = torch.randn(5, 3, 7) * 3
        results = {}
        for side, kind in (("reference", torch.float64), ("theirs", dtype), ("ours", dtype)):
            layer, input = copy.deepcopy(theirs).to(kind), x.to(dtype).to(kind).requires_grad_()
            if dtype is not torch.float64:  # the reference has the rounded weights
                layer.load_state_dict({key: value.to(dtype) for key, value in theirs.state_dict().items()})
            if side == "ours":
                assert len(fastops.replace_(layer).replaced) == 1, name
                assert type(layer).__module__ == "fastops.huggingface"
            with fastops.record() as calls:
                y = layer(input)
            assert [row.kernel != "aten" for row in calls] == ([True] if side == "ours" else []), name
            gradients = torch.autograd.grad(y.sum(), [input, *layer.parameters()])
            results[side] = [y, *gradients]
        for ours, reference, other in zip(results["ours"], results["reference"], results["theirs"], strict=True):
            close(ours, reference, other, name, terms=15, roundings=2.0)


def test_an_activation_with_another_function_is_left_alone():
    layer = activations.GELUActivation()
    layer.act = torch.tanh
    report = fastops.replace_(layer)
    assert [row.result for row in report.skipped] == ["its act is not the function of its class"]
    assert fastops.restore_(layer).replaced == []


def test_activations_without_a_kernel_are_left_alone():
    model = torch.nn.Sequential(activations.QuickGELUActivation(), activations.FastGELUActivation())
    assert len(fastops.replace_(model).left) == 2


# ---- accelerate, peft, Trainer ---------------------------------------------------------------------------------------


def test_accelerate():
    """Replaced before and after prepare."""
    from accelerate import Accelerator

    losses = []
    for when in ("never", "before", "after"):
        torch.manual_seed(0)
        model = bert()
        if when == "before":
            fastops.replace_(model)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if when == "after":
            fastops.replace_(model)
        losses.append([])
        for _ in range(2):
            loss = model(**batch(model)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        kinds = {type(one).__module__.partition(".")[0] for one in accelerator.unwrap_model(model).modules()}
        assert ("fastops" in kinds) is (when != "never")
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("first", ["replace_", "lora"])
def test_lora(first, tmp_path):
    """peft's adapters over replaced layers, and replaced layers under peft's adapters; trained, saved, merged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapted(model, ours):
        config = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_dropout=0.0)
        if ours and first == "replace_":
            fastops.replace_(model)
        torch.manual_seed(2)
        model = get_peft_model(model, config)
        if ours and first == "lora":
            fastops.replace_(model)
        return model

    base = gpt2()
    plain, ours = (adapted(copy.deepcopy(base), side) for side in (False, True))
    layer = ours.base_model.model.transformer.h[0].attn.c_attn
    assert type(layer.base_layer).__module__ == "fastops.huggingface"
    with fastops.record() as calls:
        losses = train(ours)
    assert sum(row.op == "linear" for row in calls) > 0
    assert losses == pytest.approx(train(plain), rel=1e-5)
    ours.eval()
    inputs = batch(base)
    expected = ours(**inputs).logits
    torch.testing.assert_close(expected, plain.eval()(**inputs).logits, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-4
    )
    merged = ours.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn).__module__ == "fastops.huggingface"
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            generator = torch.Generator().manual_seed(i)
            return {"input_ids": torch.randint(3, VOCABULARY, (8,), generator=generator), "labels": i % 3}

    def run(ours):
        torch.manual_seed(0)
        model = bert()
        if ours:
            fastops.replace_(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", optim="adamw_torch", seed=0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Data())
        trainer.train()
        return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    (plain, expected), (model, losses) = run(False), run(True)
    assert len(losses) == 3
    assert losses == pytest.approx(expected, rel=1e-3)
    assert type(model.classifier) is fastops.nn.Linear
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


def test_example(capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    main(["--steps", "10", "--width", "32"])
    printed = capsys.readouterr().out
    expected, losses = (
        [float(loss) for loss in re.search(rf"losses with {side}: (.*)", printed)[1].split()]
        for side in ("PyTorch", "fastops")
    )
    assert len(losses) == 5
    assert losses == pytest.approx(expected, abs=1e-3)
    assert "merged and frozen" in printed

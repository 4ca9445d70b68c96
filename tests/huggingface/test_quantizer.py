"""from_pretrained with an FxQuantConfig, save_pretrained, and what users do with such models."""

import copy
import functools
import json
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxquant
from fxquant import QConfigMapping, default_dynamic_qconfig, default_dynamic_qconfig_mapping
from fxquant.errors import ArgumentError, CheckpointError, MappingNameError, ModelStateError, QConfigError
from fxquant.graph.record import record_of
from fxquant.graph.why import Rounded

transformers = pytest.importorskip("transformers", reason="needs transformers 5", minversion="5.0")

from transformers.quantizers import auto  # noqa: E402

from fxquant.huggingface import FxQuantConfig, FxQuantizer, as_pretrained  # noqa: E402 - they need transformers
from tests.huggingface.models import MODELS, float_outputs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
transformers.logging.disable_progress_bar()
TRIED = ["BERT", "GPT-2"]  # docs/coverage.md has more


class Case:
    """A model's float form, its quantized one, the folders of both, inputs, and what quantize_dynamic makes of it."""

    def __init__(self, name, room):
        torch.manual_seed(0)
        make, inputs = MODELS[name]
        self.model, self.inputs, self.room = make().eval(), inputs(), room
        self.model.save_pretrained(room / "float")
        self.type = type(self.model)
        self.quantized = self.type.from_pretrained(room / "float", quantization_config=FxQuantConfig())
        self.quantized.save_pretrained(room / "quantized")

    @functools.cached_property
    def by_hand(self):
        return fxquant.quantize_dynamic(self.model)

    def load(self, **options):
        return self.type.from_pretrained(self.room / "quantized", **options)

    def quantize(self, config, **options):
        return self.type.from_pretrained(self.room / "float", quantization_config=config, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A function from a model's name to its Case, made once."""
    return functools.cache(lambda name: Case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=TRIED)
def case(request, cases):
    return cases(request.param)


@pytest.fixture
def gpt2(cases):
    return cases("GPT-2")


def same(a, b, inputs):
    return all(map(torch.equal, float_outputs(a, inputs), float_outputs(b, inputs)))


def test_it_quantizes_on_load_as_quantize_dynamic_does(case):
    assert type(case.quantized) is type(case.model)
    assert same(case.quantized, case.by_hand, case.inputs)
    assert isinstance(case.quantized.hf_quantizer, FxQuantizer)
    record = case.quantized.hf_quantizer.record
    assert record.outcome == record_of(case.by_hand).outcome
    assert record.outcome in str(fxquant.explain(case.quantized))


@pytest.mark.parametrize("name", [*TRIED, "Wav2Vec2"])  # whose weight norm is computed once
def test_a_saved_folder_loads_bit_for_bit(cases, name):
    case = cases(name)
    loaded = case.load()
    state, again = case.quantized.state_dict(), loaded.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {n: tensor.dtype for n, tensor in again.items()}
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert same(loaded, case.quantized, case.inputs)
    assert loaded.hf_quantizer.record.sites == case.quantized.hf_quantizer.record.sites
    assert loaded.device.type == "cpu"
    frozen = {name for name, parameter in case.quantized.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad} == frozen


def test_a_sharded_folder_loads_bit_for_bit_and_saves_again(case, tmp_path):
    case.quantized.save_pretrained(tmp_path / "one", max_shard_size="60KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    case.type.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert same(case.type.from_pretrained(tmp_path / "two"), case.quantized, case.inputs)


class Floats(TorchDispatchMode):
    """Collects the sizes of the float tensors with data that are made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        self.sizes += [tensor.numel() for tensor in tensors if tensor.is_floating_point()]
        return result


def test_loading_makes_no_float_weights(gpt2):
    with Floats() as made:
        gpt2.load()
    assert made.sizes  # biases and norms
    assert max(made.sizes) < 64 * 64
    with Floats() as made:
        gpt2.quantize(FxQuantConfig())
    assert max(made.sizes) >= 64 * 64


def test_tied_integers_are_stored_once_and_stay_one_tensor(gpt2):
    with safe_open(gpt2.room / "quantized" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "transformer.wte.weight_int8" in names
    assert not [name for name in names if name.startswith("lm_head")]
    for model in (gpt2.load(), gpt2.quantize(FxQuantConfig()), as_pretrained(copy.deepcopy(gpt2.by_hand))):
        assert model.lm_head.weight_int8 is model.transformer.wte.weight_int8
        model.tie_weights()  # accelerate and Trainer call it
        assert same(model, gpt2.quantized, gpt2.inputs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_gives_the_tokens_of_the_float_model(gpt2, options):
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    tokens = gpt2.load().generate(**gpt2.inputs, **options)
    assert torch.equal(tokens, gpt2.by_hand.generate(**gpt2.inputs, **options))
    assert torch.equal(tokens, gpt2.model.generate(**gpt2.inputs, **options))  # of this seed's weights


def test_the_mapping_travels_in_config_json(cases, tmp_path):
    case = cases("BERT")
    mapping = default_dynamic_qconfig_mapping().set_object_type(nn.Embedding, None).set_module_name("cls", None)
    mapping.set_module_name_regex(r".*attention.*", fxquant.int4_dynamic_qconfig)
    quantized = case.quantize(FxQuantConfig(mapping))
    quantized.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "fxquant"
    assert FxQuantConfig(**stored).mapping_for(case.model) == mapping
    loaded = case.type.from_pretrained(tmp_path)
    assert same(loaded, quantized, case.inputs)
    assert isinstance(loaded.cls.predictions.decoder, nn.Linear)
    assert loaded.bert.encoder.layer[0].attention.self.query.weight_int4.dtype == torch.uint8
    reasons = {part.path: part.reason for part in loaded.hf_quantizer.record.skipped}
    assert reasons["cls.predictions.decoder"] == "the mapping says float"


def test_a_name_that_is_not_in_the_model_is_an_error_before_weights_are_read(cases):
    config = FxQuantConfig(QConfigMapping().set_module_name("bert.encoder.layers.0", default_dynamic_qconfig))
    with Floats() as made, pytest.raises(MappingNameError, match=r"did you mean 'bert\.encoder\.layer\.0'"):
        cases("BERT").quantize(config)
    assert max(made.sizes, default=0) < 64 * 64


def test_strict_refuses_what_would_stay_float(cases):
    with pytest.raises(QConfigError, match="convolutions of fewer than 64 output channels"):
        cases("Wav2Vec2").quantize(FxQuantConfig(strict=True))


def test_another_class_of_the_same_model_loads_its_part(cases, tmp_path):
    case = cases("BERT")
    encoder = transformers.BertModel.from_pretrained(case.room / "quantized", add_pooling_layer=False)
    assert same(encoder, case.quantized.bert, case.inputs)
    encoder.save_pretrained(tmp_path)
    classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    hidden = classifier(**case.inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, encoder(**case.inputs).last_hidden_state)


def test_half_precision_is_kept(cases, tmp_path):
    case = cases("T5")  # which keeps some layers in float32
    quantized = case.quantize(FxQuantConfig(), dtype=torch.float16)
    quantized.save_pretrained(tmp_path)
    loaded = case.type.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert same(loaded, quantized, case.inputs)
    dtypes = [
        [layer.weight.dtype for layer in m.modules() if isinstance(layer, nn.Linear)] for m in (loaded, quantized)
    ]
    assert dtypes[0] == dtypes[1]
    assert set(dtypes[0]) == {torch.float16, torch.float32}
    assert case.type.from_pretrained(tmp_path, dtype=torch.float32)(**case.inputs).logits.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_it_loads_onto_a_named_device(gpt2, device_map):
    pytest.importorskip("accelerate", reason="transformers needs it for device_map")
    assert same(gpt2.load(device_map=device_map), gpt2.quantized, gpt2.inputs)


@pytest.mark.parametrize("device_map", [{"a": "cpu", "b": "disk"}, {"a": 0, "b": "cpu"}, {"": "disk"}], ids=str)
def test_a_model_on_several_devices_or_the_disk_is_refused(device_map):
    with pytest.raises(ArgumentError, match="device_map spreads the model over"):
        FxQuantizer(FxQuantConfig()).validate_environment(device_map=device_map)


def test_copies_and_pickles_save_as_well(gpt2, tmp_path):
    loaded = gpt2.load()
    for number, twin in enumerate((copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)))):
        twin.save_pretrained(tmp_path / str(number))
        assert same(gpt2.type.from_pretrained(tmp_path / str(number)), gpt2.quantized, gpt2.inputs)


def test_a_model_rounded_by_gptq_is_saved_too(gpt2, tmp_path):
    mapping = QConfigMapping().set_global(fxquant.int4_dynamic_qconfig).set_object_type(nn.Embedding, None)
    quantized = as_pretrained(fxquant.quantize_dynamic(gpt2.model, mapping, data=[gpt2.inputs]))
    quantized.save_pretrained(tmp_path)
    loaded = gpt2.type.from_pretrained(tmp_path)
    assert same(loaded, quantized, gpt2.inputs)
    assert {site.rounded for site in loaded.hf_quantizer.record.sites} == {(Rounded.GPTQ,)}
    assert getattr(gpt2.model, "hf_quantizer", None) is None
    assert "quantization_config" not in gpt2.model.config.to_dict()
    with pytest.raises(ModelStateError, match="needs the result of quantize_dynamic"):
        as_pretrained(gpt2.model)


def test_trainer_evaluates(gpt2, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs it")
    ids = torch.randint(5, 200, (4, 9))
    options = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": x, "labels": x} for x in ids]
    trainer = transformers.Trainer(gpt2.load(), options, eval_dataset=data)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    with torch.no_grad():
        assert (trainer.predict(data).predictions == gpt2.quantized(input_ids=ids).logits.numpy()).all()


def test_adapters_of_peft_train_on_it_and_the_base_stays(gpt2, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    lora = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(gpt2.load(), lora)
    x = torch.randint(5, 200, (2, 8))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(6):
        losses.append(model.train()(input_ids=x, labels=x).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(gpt2.load(), tmp_path)
    assert torch.equal(again.eval()(input_ids=x).logits, model.eval()(input_ids=x).logits)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=x).logits, gpt2.quantized(input_ids=x).logits)


def test_dequantizing_says_what_to_do(gpt2):
    with pytest.raises(ModelStateError, match="load the float model"):
        gpt2.quantized.dequantize()


def test_a_process_that_does_not_import_fxquant_gets_an_error(gpt2, monkeypatch):
    for registry in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(registry, "fxquant")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        gpt2.load()


def test_the_load_report_names_nothing_of_ours(gpt2):
    _, info = gpt2.load(output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_state_dict_alone_is_refused(gpt2):
    quantizer = FxQuantizer(gpt2.quantized.hf_quantizer.quantization_config)
    with pytest.raises(CheckpointError, match="got a state_dict"):
        quantizer._process_model_before_weight_loading(gpt2.quantized, checkpoint_files=None)

"""Modules are made smaller, and what is left is trained as before: kinds of layers, ties, frozen parameters."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.certify.architectures import LAYERS, NOT_IN_FLOAT64, architectures
from lightning_mics.certification.shrinking import CannotShrinkError, shrunk
from recipes.models.causal_lm import CausalLM

ARCHITECTURES = architectures()
WIDTH = 8

# -- models of transformers --------------------------------------------------------------------------------------------

MORE_LAYERS = {"bamba": 3, "jamba": 3, "recurrent_gemma": 3}  # than 2, for layers of all kinds


def layers(config: Any) -> Any:
    return getattr(config, "depths", None) or getattr(config, "block_sizes", None) or config.num_hidden_layers


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one, without positions of layers."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(same) for same in names.values() if len(same) > 1}


def test_there_are_many_architectures() -> None:
    assert len(ARCHITECTURES) >= 55
    assert set(ARCHITECTURES) >= NOT_IN_FLOAT64 | MORE_LAYERS.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_transformers_is_trained_with_fewer_layers(name: str) -> None:
    model, batch = ARCHITECTURES[name]()
    tied = ties(model)
    smaller, words = shrunk(model)
    expected = MORE_LAYERS.get(name, 2)
    assert layers(smaller.config) in (expected, [expected, expected])
    assert layers(model.config) in (LAYERS, [LAYERS, LAYERS])
    assert len(words) == 1 and words[0].startswith(f"{type(model).__name__}: ")
    names = frozenset(dict(smaller.named_parameters(remove_duplicate=False)))
    assert ties(smaller) == {same for tie in tied if len(same := tie & names) > 1}
    if name not in NOT_IN_FLOAT64:
        smaller.double()
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    loss = smaller(**batch).loss
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in smaller.parameters())


class Around(L.LightningModule):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.config = network.config
        self.embedding = network.get_input_embeddings()
        self.head = nn.Linear(network.config.hidden_size, 2)


def gpt2(**sizes: Any) -> Any:
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=6, n_head=4, n_positions=16, **sizes)
    return transformers.GPT2LMHeadModel(config)


def llama(**sizes: Any) -> Any:
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4}
    return transformers.LlamaConfig(**{"vocab_size": 999, "num_hidden_layers": 6, **wide, **sizes})


def llama_on_meta(**sizes: Any) -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(llama(**sizes))


def test_what_was_changed_on_a_built_model_survives() -> None:
    network = gpt2().bfloat16().eval()
    network.lm_head.weight.requires_grad_(False)  # tied to the embedding
    network.transformer.h[:4].requires_grad_(False)
    network.gradient_checkpointing_enable()
    module, words = shrunk(Around(network))
    assert isinstance(module, Around)
    assert words == ["Around.network (GPT2LMHeadModel): n_layer 6 -> 2"]
    assert module.network is not network and not module.network.training and module.training
    assert module.network.lm_head.weight is module.network.transformer.wte.weight is module.embedding.weight
    assert module.config is module.network.config and network.config.n_layer == 6
    assert module.network.is_gradient_checkpointing
    assert {parameter.dtype for parameter in module.network.parameters()} == {torch.bfloat16}
    frozen = {parameter for parameter in module.network.parameters() if not parameter.requires_grad}
    assert frozen == {module.embedding.weight, *module.network.transformer.h[0].parameters()}


def test_hooks_survive() -> None:
    network = gpt2()
    called = []
    network.transformer.h[1].register_forward_hook(lambda *_: called.append("second"))
    network.transformer.h[5].register_forward_hook(lambda *_: called.append("last"))
    module, _ = shrunk(network)
    assert module is not network
    module(torch.arange(3)[None])
    assert called == ["second"]


def test_a_tie_of_ones_own_survives() -> None:
    network = gpt2()
    network.transformer.h[1].mlp.c_fc.weight = network.transformer.h[0].mlp.c_fc.weight
    module, _ = shrunk(nn.ModuleDict({"network": network}))
    blocks = module["network"].transformer.h
    assert len(blocks) == 2
    assert blocks[0].mlp.c_fc.weight is blocks[1].mlp.c_fc.weight is not blocks[1].mlp.c_proj.weight


def _adapted(network: Any) -> None:
    for block in network.transformer.h:
        block.mlp.c_fc = nn.Sequential(block.mlp.c_fc, nn.Linear(128, 128))


def _compiled(network: Any) -> None:
    network.transformer.compile(backend="eager")


@pytest.mark.parametrize("change", [_adapted, _compiled])
def test_a_model_changed_after_it_was_built_loses_blocks(change: Callable[[Any], None]) -> None:
    network = gpt2()
    change(network)
    module, words = shrunk(network)
    assert module is network and len(network.transformer.h) == 2
    ids = torch.arange(8)[None]
    module(input_ids=ids, labels=ids).loss.backward()
    assert words == ["GPT2LMHeadModel.transformer.h: blocks 6 -> 2"]


def test_a_model_whose_last_layer_has_a_second_name_loses_blocks() -> None:
    network = gpt2()
    module = nn.ModuleDict({"network": network, "last": network.transformer.h[5]})
    _, words = shrunk(module)
    assert words == ["ModuleDict.network.transformer.h: blocks 6 -> 3"]
    assert module["network"] is network and module["last"] is network.transformer.h[2]


def test_the_configuration_of_a_network_built_later_is_replaced() -> None:
    config = llama(hidden_size=32, num_attention_heads=4)
    module, words = shrunk(CausalLM(network=config, optimizer=lambda module: None))
    assert words == ["CausalLM.config: num_hidden_layers 6 -> 2"]
    assert config.num_hidden_layers == 6
    module.configure_model()
    assert len(module.network.model.layers) == 2


class OwnConfig(transformers.PreTrainedConfig):  # `transformers` knows no network for it
    model_type = "own"
    layer_types: Any = None
    num_hidden_layers: int = 12
    dense_layers: Any = None


class OwnNetwork(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


@pytest.mark.parametrize(
    ("full", "dense", "left"),
    [
        ([5, 11], [0, 1], (["sliding_attention", "full_attention"], [0])),  # of layers 0 and 5
        ([0, 11], [7], (["full_attention", "sliding_attention"], [])),
        ([1, 3], [1, 11], (["sliding_attention", "full_attention"], [1])),
        ([], [0], (["sliding_attention", "sliding_attention"], [0])),
    ],
)
def test_layers_of_each_kind_stay(full: list[int], dense: list[int], left: tuple[list[str], list[int]]) -> None:
    types = ["full_attention" if index in full else "sliding_attention" for index in range(12)]
    module, words = shrunk(OwnNetwork(OwnConfig(layer_types=types, dense_layers=dense)))
    assert words == ["OwnNetwork.config: num_hidden_layers 12 -> 2"]
    assert (module.config.layer_types, module.config.dense_layers) == left
    assert module.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("kind", "sizes", "left"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 3, "num_hidden_layers": 61}, 4),
        ("qwen3_moe", {"decoder_sparse_step": 3, "num_hidden_layers": 48}, 3),
        ("gemma3_text", {"num_hidden_layers": 26}, 2),
        ("jamba", {}, 5),
    ],
)
def test_layers_of_each_class_stay(kind: str, sizes: dict[str, Any], left: int) -> None:
    module, _ = shrunk(OwnNetwork(transformers.AutoConfig.for_model(kind, **sizes)))
    assert module.config.num_hidden_layers == left


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_oss", "helium", "bart", "mamba", "swin"])
def test_models_of_usual_sizes_fit(kind: str) -> None:
    module, _ = shrunk(OwnNetwork(transformers.AutoConfig.for_model(kind)))
    with torch.device("meta"):
        network = transformers.AutoModel.from_config(module.config)
    assert 1_000_000 < sum(parameter.numel() for parameter in network.parameters()) < 20_000_000


def test_a_configuration_in_hyperparameters_is_the_same_one() -> None:
    class Saved(L.LightningModule):
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.network_config = network

    module, words = shrunk(Saved(llama()), wanted_parameters=20_000_000)
    assert isinstance(module, Saved)
    assert words == ["Saved.network_config: num_hidden_layers 6 -> 2"]
    assert module.hparams["network"] is module.network_config


def test_a_configuration_beside_an_unknown_network_stays() -> None:
    module = chain(2)
    module.config = llama()
    assert shrunk(module)[1] == [] and module.config.num_hidden_layers == 6


def test_widths_shrink_only_if_they_must() -> None:
    assert shrunk(llama_on_meta(), wanted_parameters=20_000_000)[0].config.hidden_size == 512
    module, words = shrunk(llama_on_meta())
    assert all(parameter.is_meta for parameter in module.parameters())
    config = module.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (128, 4, 1)
    assert (config.intermediate_size, config.head_dim, config.vocab_size) == (256, 32, 999)
    assert words == [
        "LlamaForCausalLM: hidden_size 512 -> 128, intermediate_size 1024 -> 256, num_hidden_layers 6 -> 2, "
        "num_attention_heads 16 -> 4, num_key_value_heads 4 -> 1"
    ]
    ids = torch.arange(8)[None]
    module(input_ids=ids, labels=ids).loss.backward()


def test_nested_configurations_shrink_together() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config={**sizes, "image_size": 16})
    module, words = shrunk(transformers.CLIPModel(config))
    assert words == ["CLIPModel: text_config.num_hidden_layers 6 -> 2, vision_config.num_hidden_layers 6 -> 2"]
    assert len(module.text_model.encoder.layers) == len(module.vision_model.encoder.layers) == 2


def test_a_large_vocabulary_is_refused() -> None:
    with pytest.raises(CannotShrinkError, match=r"lm_head.weight|embed_tokens.weight") as error:
        shrunk(llama_on_meta(vocab_size=1_000_000))
    assert "LlamaForCausalLM still has" in str(error.value) and "[1000000, " in str(error.value)
    later = CausalLM(network=llama(vocab_size=10_000_000), optimizer=lambda module: None)
    with pytest.raises(CannotShrinkError, match=r"the network of CausalLM\.config still has"):
        shrunk(later)


# -- other modules -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, *, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.one = nn.Linear(WIDTH, width)
        self.two = nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.tanh(self.one(x)))
        return x * y.sigmoid() if self.gated else x + y


class Called(nn.Module):
    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.modules():
            x = block(x) if isinstance(block, Block) else x
        return x


def chain(blocks: int = 8, make: Callable[[int], nn.Module] = lambda _: Block()) -> Any:
    return Called(nn.ModuleList(make(index) for index in range(blocks)))


def in_containers() -> dict[str, nn.Module]:
    named = OrderedDict((f"block{index}", Block()) for index in range(8))
    return {
        "a list": chain(),
        "a sequence": nn.Sequential(*(Block() for _ in range(8))),
        "a sequence with names": nn.Sequential(named),
        "a dictionary": Called(nn.ModuleDict(named)),
        "lists in a list": Called(nn.ModuleList(nn.ModuleList(Block() for _ in range(5)) for _ in range(2))),
    }


def losses(module: nn.Module) -> None:
    module(torch.randn(3, WIDTH)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ("a list", ["Called.blocks: blocks 8 -> 2"]),
        ("a sequence", ["Sequential: blocks 8 -> 2"]),
        ("a sequence with names", ["Sequential: blocks 8 -> 2"]),
        ("a dictionary", ["Called.blocks: blocks 8 -> 2"]),
        ("lists in a list", ["Called.blocks.0: blocks 5 -> 2", "Called.blocks.1: blocks 5 -> 2"]),
    ],
)
def test_equal_blocks_are_dropped(container: str, words: list[str]) -> None:
    module = in_containers()[container]
    before = dict(module.named_parameters())
    smaller, said = shrunk(module)
    assert smaller is module and sorted(said) == words
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    losses(module)


def test_as_many_blocks_stay_as_asked() -> None:
    assert len(shrunk(chain(), blocks=3)[0].blocks) == 3
    assert len(shrunk(chain(4))[0].blocks) == 4  # it is small


def test_a_tied_block_stays() -> None:
    module = chain()
    module._no_split_modules = ["Block"]
    module.blocks[5].one.weight = module.blocks[7].one.weight
    last = list(module.blocks)[5:]
    shrunk(module)
    assert list(module.blocks)[2:] == last


def test_a_block_with_a_second_name_stays() -> None:
    module = chain()
    module.best = module.blocks[6]
    shrunk(module)
    assert module.best in module.blocks and len(module.blocks) == 4  # two before it, one after it


def test_frozen_and_trained_blocks_stay() -> None:
    module = chain()
    module.blocks[:5].requires_grad_(False)
    shrunk(module)
    assert [block.one.weight.requires_grad for block in module.blocks] == [False, False, True, True]


def test_odd_blocks_stay() -> None:
    module, _ = shrunk(chain(9, lambda index: Block(gated=index == 3) if index != 6 else Block(2 * WIDTH)))
    kinds = ["wide" if block.one.out_features > WIDTH else block.gated for block in module.blocks]
    assert kinds == [False, False, True, False, False, "wide", False, False]


def test_a_chain_whose_widths_alternate_still_fits() -> None:
    wide = [nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)]
    module = nn.Sequential(*(copy.deepcopy(wide[index % 2]) for index in range(10)))
    _, words = shrunk(module)
    assert words == ["Sequential: blocks 10 -> 4"]
    losses(module)


def test_two_lists_are_cut_if_one_is_not_enough() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = chain(8)
            self.decoder = chain(6)

    assert shrunk(Pair())[1] == ["Pair.encoder.blocks: blocks 8 -> 2"]
    assert shrunk(Pair(), most_parameters=1000)[1][1] == "Pair.decoder.blocks: blocks 6 -> 2"


def test_what_remains_too_large_is_refused() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(1000, WIDTH), "chain": chain()})
    with pytest.raises(CannotShrinkError) as error:
        shrunk(module, most_parameters=5000)
    assert str(error.value) == (
        "ModuleDict still has 8,288 parameters with fewer and narrower blocks, more than most_parameters=5,000; "
        "8,000 are in 'embedding', and the largest parameter is 'embedding.weight', [1000, 8]; pass a callable that "
        "makes a smaller module, and shrink=False"
    )


def test_transformers_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    shrunk(chain())
    assert not [name for name in sys.modules if name.partition(".")[0] == "transformers"]

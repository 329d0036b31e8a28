"""transformers: FP8 models stay FP8 on every device that moekern has kernels for.

    import moekern.integrations.transformers as moekern_transformers

    moekern_transformers.install()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moekern")

Without it transformers turns every FP8 checkpoint into bf16 where there is neither CUDA nor XPU, and refuses to
quantise there. What is replaced, and put back by `uninstall`:

- the three functions behind FP8Linear, FP8GroupedLinear and FP8Experts, for tensors on moekern's devices; others
  still go to the kernels that transformers downloads;
- the quantizer "fp8": it neither turns weights into bf16 nor leaves those out whose sizes are no multiples of a block;
- the reading of "compressed-tensors" settings: those of FP8 weights in blocks are read as "fp8";
- "moekern", a new name among the implementations of experts: `fused_experts` for FP8 ones, and for bf16, f16 and
  f32 ones moekern's permutation around torch's grouped product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

import moekern
from moekern.integrations.compressed_tensors import OURS, SCALE, block_fp8
from moekern.layout import GroupedLayout, at_hand
from moekern.scaled import ScaledTensor

Module = Any  # a module of transformers, whose attributes only it declares
NAME = "moekern"
OLDEST, NEWEST = (5, 20), (5, 24)  # releases that the tests run with
QUANTIZES = (5, 23)  # before, transformers cast weights to FP8 without scales, and then quantised those
ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class _Replaced(NamedTuple):
    """What transformers had before."""

    functions: Any  # FineGrainedFP8, or None where nothing was loaded yet
    quantizer: Any
    compressed_tensors: Any


_replaced: _Replaced | None = None
_quantize_activations = False


class Installation:
    """What `install` returns: as a context manager, it uninstalls at the end of the block."""

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *error: object) -> None:
        uninstall()


def installed() -> bool:
    return _replaced is not None


def install(*, quantize_activations: bool = False, allow_untested: bool = False) -> Installation:
    """Let transformers run FP8 models by moekern's kernels. Again, it only changes the options.

    quantize_activations: False computes with float activations as they are (W8A16), True casts them to 1x128 FP8
        first, as transformers' own kernels do (W8A8).
    allow_untested: also with a release of transformers newer than the tests know.

    Raises ImportError if transformers is missing, too old, or newer than tested.
    """
    global _replaced, _quantize_activations
    _quantize_activations = quantize_activations
    if installed():
        return Installation()
    _check_version(allow_untested)
    from transformers.integrations import finegrained_fp8 as fp8
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    compressed_tensors = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    _replaced = _Replaced(fp8._FINEGRAINED_FP8, AUTO_QUANTIZER_MAPPING["fp8"], compressed_tensors)
    fp8._FINEGRAINED_FP8 = fp8.FineGrainedFP8(matmul, batched_matmul, grouped_matmul)
    fp8.ALL_FP8_EXPERTS_FUNCTIONS[NAME] = fp8_experts
    ALL_EXPERTS_FUNCTIONS[NAME] = experts
    read_settings, settings_class = _settings_of_compressed_tensors(compressed_tensors)
    AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = read_settings
    AUTO_QUANTIZER_MAPPING["fp8"] = _quantizer(_replaced.quantizer, settings_class)
    return Installation()


def uninstall() -> None:
    """Undo `install`. Models that were loaded keep their FP8 weights, and need whatever transformers has for them."""
    global _replaced
    if _replaced is None:
        return
    from transformers.integrations import finegrained_fp8 as fp8
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    fp8._FINEGRAINED_FP8 = _replaced.functions
    AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = _replaced.compressed_tensors
    AUTO_QUANTIZER_MAPPING["fp8"] = _replaced.quantizer
    del fp8.ALL_FP8_EXPERTS_FUNCTIONS[NAME], ALL_EXPERTS_FUNCTIONS[NAME]
    _replaced = None


def _release() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _check_version(allow_untested: bool) -> None:
    import transformers

    release = _release()
    known = f"moekern knows transformers {_dotted(OLDEST)} to {_dotted(NEWEST)}"
    if release < OLDEST:
        raise ImportError(f"{known}; this is {transformers.__version__}, which lacks the hooks")
    if release > NEWEST and not allow_untested:
        raise ImportError(f"{known}; this is {transformers.__version__}: install(allow_untested=True) tries it")


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


# ---- the three functions -----------------------------------------------------------------------------


def _is_ours(x: torch.Tensor) -> bool:
    """Whether moekern has a kernel for where x is. torch calls AMD's devices "cuda", too."""
    kinds = {"cuda": ("cuda", "rocm")}.get(x.device.type, (x.device.type,))
    return any(kernel.kind in kinds for kernel in moekern.fp8_gemm_nt.kernels)


def _theirs() -> Any:
    """transformers' own three functions, which it loads at the first need."""
    from transformers.integrations import finegrained_fp8 as fp8

    global _replaced
    assert _replaced is not None
    if _replaced.functions is None:
        ours, fp8._FINEGRAINED_FP8 = fp8._FINEGRAINED_FP8, None
        try:
            _replaced = _replaced._replace(functions=fp8.load_finegrained_fp8_kernel())
        finally:
            fp8._FINEGRAINED_FP8 = ours
    return _replaced.functions


def _weights(weight: torch.Tensor, scale: torch.Tensor, block_size: Any) -> ScaledTensor:
    """Of one matrix, or of a stack; without a block size there is one scale for each matrix."""
    if weight.dtype == torch.int8:
        raise NotImplementedError("moekern has no FP4: the weights are torch.int8, two e2m1 values a byte")
    if block_size is None:
        return ScaledTensor(weight, scale.reshape(*weight.shape[:-2], 1, 1), (weight.shape[-2], weight.shape[-1]))
    return ScaledTensor(weight, scale, tuple(block_size))


def _activations(x: torch.Tensor, static_scale: torch.Tensor | None = None) -> torch.Tensor | ScaledTensor:
    if not _quantize_activations:
        return x
    if static_scale is None:
        return moekern.per_token_cast_to_fp8(x)
    limit = torch.finfo(torch.float8_e4m3fn).max
    data = (x.float() / static_scale).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return ScaledTensor(data, static_scale.float().reshape(1, 1), (x.shape[0], x.shape[1]))


def matmul(  # type: ignore[no-untyped-def]
    x, weight, scale, block_size=None, output_dtype=None, *, activation_scale=None, **options
):
    """x [..., K] times weight [N, K]^T, for FP8Linear."""
    if not _is_ours(x):
        return _theirs().matmul(
            x, weight, scale, block_size, output_dtype, activation_scale=activation_scale, **options
        )
    a = _activations(x.reshape(-1, x.shape[-1]), activation_scale)
    y = moekern.fp8_gemm_nt(a, _weights(weight, scale, block_size), out_dtype=output_dtype or x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_matmul(x, weight, scale, *, offsets, tokens_per_expert=None, block_size=None, **options):  # type: ignore[no-untyped-def]
    """Rows offsets[e - 1] to offsets[e] of x times weight[e]^T; rows past the last offset are anybody's."""
    if not _is_ours(x):
        return _theirs().grouped_matmul(
            x, weight, scale, offsets=offsets, tokens_per_expert=tokens_per_expert, block_size=block_size, **options
        )
    layout = GroupedLayout.from_ends(offsets, rows=x.shape[0], check=at_hand(offsets))
    return _grouped(x, _weights(weight, scale, block_size), layout)


def batched_matmul(x, weight, scale, *, expert_ids, block_size=None, **options):  # type: ignore[no-untyped-def]
    """x[i] times weight[expert_ids[i]]^T; zeros where there is no such expert."""
    if not _is_ours(x):
        return _theirs().batched_matmul(x, weight, scale, expert_ids=expert_ids, block_size=block_size, **options)
    ids = _local(expert_ids, weight.shape[0]).unsqueeze(1)
    rows, layout, inverse = moekern.moe_permute(x, ids, weight.shape[0])
    return moekern.moe_unpermute(_grouped(rows, _weights(weight, scale, block_size), layout), inverse)


def _grouped(x: torch.Tensor, weights: ScaledTensor, layout: GroupedLayout) -> torch.Tensor:
    return moekern.m_grouped_fp8_gemm_nt_contiguous(_activations(x), weights, layout, out_dtype=x.dtype)


def _local(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """-1 for the number that transformers has for experts that live elsewhere."""
    return torch.where(ids < experts, ids, -1)


# ---- experts -----------------------------------------------------------------------------------------


def fp8_experts(
    self: Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of FP8Experts: in one call, or in parts where that has no gradient or no such gate."""
    if not _is_ours(hidden_states):
        from transformers.integrations.finegrained_fp8 import fp8_grouped_mm_experts_forward

        return fp8_grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if self.activation_scheme == "static":
        raise NotImplementedError("moekern's experts take dynamic activations; this checkpoint's have static scales")
    ids, weights, gating = _ids(self, top_k_index), top_k_weights.to(torch.float32), _gating(self)
    learns = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
    if gating is not None and not learns:
        return moekern.fused_experts(
            hidden_states, _expert_weights(self), ids, weights, quantize_activations=_quantize_activations, **gating
        )
    return _in_parts(self, hidden_states, ids, weights, lambda x, name, layout: _grouped(x, _stack(self, name), layout))


def experts(
    self: Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of experts in bf16, f16 or f32: moekern's permutation around torch's grouped product."""
    from transformers.integrations.moe import _grouped_linear, grouped_mm_experts_forward

    if not _is_ours(hidden_states) or getattr(self, "has_post_expert_norm", False):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def product(x: torch.Tensor, name: str, layout: GroupedLayout) -> torch.Tensor:
        ends = (layout.starts + layout.counts).to(torch.int32)
        bias = getattr(self, f"{name}_bias")[layout.indices().clamp(min=0)] if self.has_bias else None
        return _grouped_linear(x, getattr(self, name), ends, bias=bias, is_transposed=self.is_transposed)

    weights = top_k_weights.to(torch.float32)
    return _in_parts(self, hidden_states, _ids(self, top_k_index), weights, product).to(hidden_states.dtype)


def _ids(module: Module, top_k_index: torch.Tensor) -> torch.Tensor:
    return _local(top_k_index, module.num_experts) if module._is_expert_parallel else top_k_index


def _in_parts(
    module: Module,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    product: Callable[[torch.Tensor, str, GroupedLayout], torch.Tensor],
) -> torch.Tensor:
    """`product` multiplies rows in the order of the experts with the module's weights of that name."""
    rows, layout, inverse = moekern.moe_permute(x, ids, module.num_experts)
    if module.has_gate:
        h = module._apply_gate(product(rows, "gate_up_proj", layout))
    else:
        h = module.act_fn(product(rows, "up_proj", layout))
    return moekern.moe_unpermute(product(h, "down_proj", layout), inverse, weights)


def _gating(module: Module) -> dict[str, Any] | None:
    """fused_experts' options for what the module does between its products, if it is anything of that kind."""
    if not module.has_gate or getattr(module, "gate_softcap", None) is not None:
        return None
    limit = getattr(module, "swiglu_limit", None)
    if (alpha := getattr(module, "swiglu_alpha", None)) is not None:
        return {"activation": "swiglu", "alpha": alpha, "beta": 1.0, "limit": limit}
    config = module.config
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return {"activation": ACTIVATIONS[name], "limit": limit} if name in ACTIVATIONS else None


_expert_weights_of: WeakKeyDictionary[torch.nn.Module, tuple[Any, moekern.ExpertWeights]] = WeakKeyDictionary()


def _expert_weights(module: Module) -> moekern.ExpertWeights:
    """Checking hundreds of matrices takes milliseconds: it is done once, unless they move."""
    if torch.compiler.is_compiling():
        return _read_experts(module)
    tensors = module.gate_up_proj, module.gate_up_proj_scale_inv, module.down_proj, module.down_proj_scale_inv
    places = tuple((x.data_ptr(), x.shape, x.dtype) for x in tensors)
    known = _expert_weights_of.get(module)
    if known is None or known[0] != places:
        known = _expert_weights_of[module] = places, _read_experts(module)
    return known[1]


def _read_experts(module: Module) -> moekern.ExpertWeights:
    w2 = _stack(module, "down_proj")
    if not _has_two_grids(module):
        return moekern.ExpertWeights(_stack(module, "gate_up_proj"), w2)
    w13 = module.gate_up_proj.detach(), module.gate_up_proj_scale_inv.detach()
    return moekern.ExpertWeights(w13, w2, split_scales=True)


def _stack(module: Module, name: str) -> ScaledTensor:
    """The weights of that name, of all experts, with one scale grid for each."""
    weight, scale = getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach()
    if name != "gate_up_proj" or not _has_two_grids(module):
        return _weights(weight, scale, module.block_size)
    rows, columns = module.block_size
    common = math.gcd(module.intermediate_dim, rows)  # blocks that end where gate ends
    halves = scale.unflatten(1, (2, -1)).repeat_interleave(rows // common, 2)
    return ScaledTensor(weight, halves[:, :, : module.intermediate_dim // common].flatten(1, 2), (common, columns))


def _has_two_grids(module: Module) -> bool:
    """Whether gate ends within a block: then up has a scale grid of its own below gate's, as in checkpoints."""
    return module.block_size is not None and module.intermediate_dim % module.block_size[0] != 0


# ---- the quantizer -----------------------------------------------------------------------------------


def _is_fp8(module: Module) -> bool:
    return module.gate_up_proj.dtype == torch.float8_e4m3fn  # and not FP4


def _give_two_grids(module: Module) -> None:
    """transformers has room for one grid of gate and up together, which checkpoints of such sizes do not have.

    Its own forms of the forward could not tell the two grids from one, so none of them is used.
    """
    scale = module.gate_up_proj_scale_inv
    rows = 2 * -(-module.intermediate_dim // module.block_size[0])
    room = scale.new_empty(len(scale), rows, scale.shape[2])
    module.gate_up_proj_scale_inv = torch.nn.Parameter(room, requires_grad=scale.requires_grad)
    module.forward = MethodType(fp8_experts, module)


def _settings_of_compressed_tensors(theirs: Any) -> tuple[Any, Any]:
    """What reads the settings in a checkpoint, and the class of those that are FP8 weights in blocks."""
    from transformers import FineGrainedFP8Config

    class BlockFP8(FineGrainedFP8Config):
        def __init__(self, settings: dict[str, Any], **parts: Any) -> None:
            super().__init__(**parts)
            self.settings = settings

        def to_dict(self) -> dict[str, Any]:
            return self.settings  # as what is saved has its old names

    class Settings(theirs):
        @classmethod
        def from_dict(cls, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            parts = block_fp8(settings)
            return theirs.from_dict(settings, *args, **kwargs) if parts is None else BlockFP8(settings, **parts)

    return Settings, BlockFP8


def _quantizer(theirs: Any, compressed_tensors: Any) -> Any:
    from transformers.core_model_loading import WeightConverter, WeightRenaming
    from transformers.integrations.finegrained_fp8 import FP8Experts, Fp8Quantize
    from transformers.utils.import_utils import is_accelerate_available, is_torch_xpu_available

    class MoekernQuantize(Fp8Quantize):
        """Blocks at the edges may be smaller, which transformers' own leaves in the model's dtype."""

        def _quantize_one(self, key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
            config = self.hf_quantizer.quantization_config
            if value.ndim < 2 or list(config.weight_block_size or ()) != [128, 128]:
                return super()._quantize_one(key, value)
            halves = 2 if key.endswith("gate_up_proj") else 1  # each has a scale grid of its own in a checkpoint
            parts = value.reshape(-1, value.shape[-2] // halves, value.shape[-1])
            cast = [moekern.per_block_cast_to_fp8(part, round_scale_up=config.scale_fmt == "ue8m0") for part in parts]
            data = torch.stack([part.data for part in cast]).reshape(value.shape)
            scale = torch.stack([part.scale for part in cast])
            scale = scale.reshape(*value.shape[:-2], halves * scale.shape[1], scale.shape[2])
            if config.scale_fmt == "ue8m0":
                scale = scale.to(torch.float8_e8m0fnu)
            name = f"{key.rsplit('.', 1)[0]}.weight_scale_inv" if key.endswith(".weight") else f"{key}_scale_inv"
            return {key: data, name: scale}

    class MoekernFP8HfQuantizer(theirs):
        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available() or is_torch_xpu_available():
                return super().validate_environment(*args, **kwargs)
            if not is_accelerate_available():
                raise ImportError("loading an FP8 model needs accelerate: pip install accelerate")
            if not self.pre_quantized and _release() < QUANTIZES:
                raise ImportError(
                    f"quantising while loading needs transformers {_dotted(QUANTIZES)}: older ones round weights to "
                    "FP8 before they know their scales"
                )

        def _process_model_before_weight_loading(self, model: Module, **kwargs: Any) -> None:
            super()._process_model_before_weight_loading(model, **kwargs)
            for module in model.modules():
                if isinstance(module, FP8Experts) and module.has_gate and _is_fp8(module) and _has_two_grids(module):
                    _give_two_grids(module)

        def update_weight_conversions(self, conversions: list[Any], *model: Any) -> list[Any]:
            found = super().update_weight_conversions(conversions, *model)
            self.scale_conversions = [
                c for c in found if isinstance(c, WeightConverter) and c.source_patterns[0].endswith("_scale_inv")
            ]
            if not isinstance(self.quantization_config, compressed_tensors):
                return found
            return [WeightRenaming(source_patterns=rf"\{SCALE}", target_patterns=OURS), *found]

        def _process_model_after_weight_loading(self, model: Module, **kwargs: Any) -> Module:
            model = super()._process_model_after_weight_loading(model, **kwargs)
            if not self.pre_quantized:
                # No file had such scales, so that transformers would not take them apart for each expert to save them.
                model._weight_conversions = [*model._weight_conversions, *self.scale_conversions]
            return model

        def get_quantize_ops(self) -> Any:
            return MoekernQuantize(self)

    return MoekernFP8HfQuantizer

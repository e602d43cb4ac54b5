"""Every Op, one class each in the families of ``kernels/``, and as functions.

The classes are what graphs are made of; the functions take MLX arrays.
"""

from ..graph.op import REGISTRY
from .apply import quantize
from .attention import KvCacheAppendNTokens, RopeNTokens, SdpaCausalTiled
from .elementwise import (
    ResidualAddNTokens,
    SigmoidGateNTokens,
    SplitQGate,
    SwigluFusedBatched,
    ZeroBuffer,
)
from .embed import EmbedGatherNTokens
from .functional import (
    batched_experts,
    causal_attention,
    combine_residual,
    conv1d_step,
    decay_beta,
    decode_experts,
    embedding,
    gated_delta_chunkwise,
    gated_delta_step,
    gated_rms_norm,
    gather_experts,
    kv_cache_append,
    linear,
    normalize_weights,
    residual_add,
    rms_norm,
    rms_norm_per_head,
    rms_norm_qk,
    rope,
    sigmoid_gate,
    softmax_topk,
    split_q_gate,
    swiglu,
    zero_buffer,
)
from .linear_attention import (
    ComputeDecayBetaNTokens,
    Conv1dStepNTokens,
    GatedDeltaNetChunkwise,
    GatedDeltaNetStepNTokens,
)
from .moe import (
    MoeBatchedPermuteFuse,
    MoeCombineResidualNTokens,
    MoeDecodeExperts,
    MoeGatherIdFuse,
    MoeNormalizeWeights,
    MoeSoftmaxTopK,
)
from .norm import (
    GatedRmsNormNTokens,
    RmsNormBf16NTokens,
    RmsNormPerHeadNTokens,
    RmsNormQkNTokens,
)
from .quant import MatvecNTokens

__all__ = [
    "REGISTRY",
    "ComputeDecayBetaNTokens",
    "Conv1dStepNTokens",
    "EmbedGatherNTokens",
    "GatedDeltaNetChunkwise",
    "GatedDeltaNetStepNTokens",
    "GatedRmsNormNTokens",
    "KvCacheAppendNTokens",
    "MatvecNTokens",
    "MoeBatchedPermuteFuse",
    "MoeCombineResidualNTokens",
    "MoeDecodeExperts",
    "MoeGatherIdFuse",
    "MoeNormalizeWeights",
    "MoeSoftmaxTopK",
    "ResidualAddNTokens",
    "RmsNormBf16NTokens",
    "RmsNormPerHeadNTokens",
    "RmsNormQkNTokens",
    "RopeNTokens",
    "SdpaCausalTiled",
    "SigmoidGateNTokens",
    "SplitQGate",
    "SwigluFusedBatched",
    "ZeroBuffer",
    "batched_experts",
    "causal_attention",
    "combine_residual",
    "conv1d_step",
    "decay_beta",
    "decode_experts",
    "embedding",
    "gated_delta_chunkwise",
    "gated_delta_step",
    "gated_rms_norm",
    "gather_experts",
    "kv_cache_append",
    "linear",
    "normalize_weights",
    "quantize",
    "residual_add",
    "rms_norm",
    "rms_norm_per_head",
    "rms_norm_qk",
    "rope",
    "sigmoid_gate",
    "softmax_topk",
    "split_q_gate",
    "swiglu",
    "zero_buffer",
]

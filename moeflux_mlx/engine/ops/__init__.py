"""Every Op, one class each, in modules named after the files of ``kernels/``.

Imports: device, products, engine.graph, experts, experts.compute.
"""

from ..graph.op import REGISTRY
from .attention import KvCacheAppendNTokens, RopeNTokens, SdpaCausalTiled
from .elementwise import (
    ResidualAddNTokens,
    SigmoidGateNTokens,
    SplitQGate,
    SwigluFusedBatched,
    ZeroBuffer,
)
from .embed import EmbedGatherNTokens
from .latent import HeadMatvecNTokens, MlaSplitQKv, SdpaLatentCausal
from .linear_attention import (
    ComputeDecayBetaNTokens,
    Conv1dStepNTokens,
    GatedDeltaNetChunkwise,
    GatedDeltaNetStepNTokens,
    PartKeyHeadsNTokens,
)
from .moe import (
    MoeBatchedPermuteFuse,
    MoeCombineResidualNTokens,
    MoeDecodeExperts,
    MoeGatherIdFuse,
    MoeNoauxTopK,
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
    "HeadMatvecNTokens",
    "KvCacheAppendNTokens",
    "MatvecNTokens",
    "MlaSplitQKv",
    "MoeBatchedPermuteFuse",
    "MoeCombineResidualNTokens",
    "MoeDecodeExperts",
    "MoeGatherIdFuse",
    "MoeNoauxTopK",
    "MoeNormalizeWeights",
    "MoeSoftmaxTopK",
    "PartKeyHeadsNTokens",
    "ResidualAddNTokens",
    "RmsNormBf16NTokens",
    "RmsNormPerHeadNTokens",
    "RmsNormQkNTokens",
    "RopeNTokens",
    "SdpaCausalTiled",
    "SdpaLatentCausal",
    "SigmoidGateNTokens",
    "SplitQGate",
    "SwigluFusedBatched",
    "ZeroBuffer",
]

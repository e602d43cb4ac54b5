"""Roles of buffers and their unions.

A role says what a buffer means, not only its shape: a pre-norm residual is not a
post-norm MoE input even where both are ``[N, D]``. Unions are base classes of roles, so
mypy and ``Graph.push`` accept a role wherever one of its unions is expected.
"""

from __future__ import annotations

import mlx.core as mx


class Buf:
    """The role of a buffer; a ``dtype`` of None is that of activations."""

    dtype: mx.Dtype | None = None


# Unions: an Op field that accepts several roles names one of these.
class RmsNormIn(Buf): ...


class RmsNormOut(Buf): ...


class MatvecIn(Buf): ...


class MatvecOut(Buf): ...


class HeadsIn(Buf):
    """Rows of per-head values, the input of one matrix per head."""


class HeadsOut(Buf):
    """Rows of per-head values, the output of one matrix per head."""


class ResidualIn(Buf):
    """The output of half a layer, added to the residual stream."""


# The residual stream and its norms.
class EmbedOutBuf(RmsNormIn): ...


class HiddenBuf(RmsNormIn): ...


class ResidualBuf(RmsNormIn): ...


class AttnInputBuf(RmsNormOut, MatvecIn): ...


class MoeInputBuf(RmsNormOut, MatvecIn): ...


class FinalNormBuf(RmsNormOut, MatvecIn): ...


class LogitsBuf(MatvecOut): ...


class TokenIdsBuf(Buf):
    dtype = mx.int32


# Full attention.
class QProjOutBuf(MatvecOut): ...


class QBuf(MatvecOut, RmsNormIn, RmsNormOut):
    """Queries: a projection, or the half of one beside its gate."""


class QGateBuf(Buf): ...


class KProjOutBuf(MatvecOut, RmsNormIn, RmsNormOut): ...


class VProjOutBuf(MatvecOut): ...


class RopeInvFreqBuf(Buf):
    dtype = mx.float32


class StartPosBuf(Buf):
    dtype = mx.int32


class AttnMaskBuf(Buf):
    dtype = mx.bool_


class KvCacheKBuf(Buf): ...


class KvCacheVBuf(Buf): ...


class AttnOutBuf(MatvecIn, HeadsOut): ...


class OProjOutBuf(MatvecOut, ResidualIn): ...


# Attention over a compressed cache.
class QRankBuf(MatvecOut, RmsNormIn): ...


class QRankNormBuf(RmsNormOut, MatvecIn): ...


class MlaQBuf(MatvecOut): ...


class MlaKvBuf(MatvecOut): ...


class QNopeBuf(HeadsIn): ...


class QRopeBuf(RmsNormIn): ...


class LatentBuf(RmsNormIn): ...


class LatentKeyBuf(KProjOutBuf):
    """The latent rows of a compressed cache, stored where others store keys."""


class RopeKeyBuf(VProjOutBuf, RmsNormIn):
    """The rope keys of a compressed cache, stored where others store values."""


class LatentQueryBuf(HeadsOut): ...


class LatentContextBuf(HeadsIn): ...


# Gated DeltaNet.
class QkvzStackBuf(MatvecOut): ...


class BetaAlphaStackBuf(MatvecOut): ...


class QkvStackBuf(MatvecOut): ...


class ZStackBuf(MatvecOut): ...


class AlphaStackBuf(MatvecOut): ...


class BetaStackBuf(MatvecOut): ...


class SeqMaskBuf(Buf):
    dtype = mx.bool_


class SeqLengthsBuf(Buf):
    dtype = mx.int32


class ConvStateBuf(Buf): ...


class ConvOutBuf(Buf): ...


class GDecayBuf(Buf):
    dtype = mx.float32


class BetaGateBuf(Buf):
    dtype = mx.float32


class DeltaStateBuf(Buf):
    dtype = mx.float32


class DeltaOutBuf(Buf): ...


class ValueOutBuf(MatvecIn): ...


# Mixture of experts.
class RouterLogitsBuf(MatvecOut): ...


class RouterIdxBuf(Buf):
    dtype = mx.int32


class RouterWeightsBuf(Buf):
    dtype = mx.float32


class ExpertBaseBuf(Buf):
    """Holds a ``GraphExperts``, not an array: experts may be on disk."""

    dtype = mx.uint8


class MoeOutSumBuf(Buf):
    dtype = mx.float32


# The shared expert, or the MLP of a dense layer.
class SharedFfnGateBuf(MatvecOut): ...


class SharedFfnUpBuf(MatvecOut): ...


class SharedFfnActBuf(MatvecIn): ...


class SharedFfnDownBuf(MatvecOut, ResidualIn): ...


class SharedGateBuf(MatvecOut): ...

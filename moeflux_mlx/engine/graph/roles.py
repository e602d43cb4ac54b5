"""Roles of buffers and their unions.

A role says what a buffer means, not only its shape: a pre-norm residual is not a
post-norm MoE input even where both are ``[N, D]``. Unions are base classes of roles,
so mypy and ``Graph.push`` accept any role where one of its unions is asked for.
"""

from __future__ import annotations

import mlx.core as mx


class Buf:
    """Role of a buffer; ``dtype`` is fixed by the role or None for activations."""

    dtype: mx.Dtype | None = None


# Unions: an Op field that accepts several roles names one of these.
class RmsNormIn(Buf): ...


class RmsNormOut(Buf): ...


class MatvecIn(Buf): ...


class MatvecOut(Buf): ...


class HeadsIn(Buf):
    """Rows with a part for each head, which a matrix of the head's own reads."""


class HeadsOut(Buf):
    """Rows with a part for each head, which such a matrix gives."""


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


class QBuf(MatvecOut, RmsNormIn):
    """Queries: a projection, or a part split from one."""


class QGateBuf(Buf): ...


class KProjOutBuf(MatvecOut, RmsNormIn): ...


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


class LatentKeyBuf(RmsNormOut, KProjOutBuf):
    """The rows of a compressed cache in the place of keys."""


class RopeKeyBuf(VProjOutBuf, RmsNormIn):
    """The rows of a compressed cache in the place of values."""


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
    """Holds an ``GraphExperts`` rather than one array: experts may be on disk."""

    dtype = mx.uint8


class MoeOutSumBuf(Buf):
    dtype = mx.float32


# The expert that every token has, or a layer's only one.
class SharedFfnGateBuf(MatvecOut): ...


class SharedFfnUpBuf(MatvecOut): ...


class SharedFfnActBuf(MatvecIn): ...


class SharedFfnDownBuf(MatvecOut, ResidualIn): ...


class SharedGateBuf(MatvecOut): ...

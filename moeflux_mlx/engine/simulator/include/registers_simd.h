// Operations of a simdgroup as one instruction each.
#define __MSL_ONE(name) \
  template <typename T> inline T simd_##name(T x) { return __msl::opaque(x); } \
  template <typename T> inline T quad_##name(T x) { return __msl::opaque(x); }
__MSL_ONE(sum)
__MSL_ONE(product)
__MSL_ONE(min)
__MSL_ONE(max)
__MSL_ONE(and)
__MSL_ONE(or)
__MSL_ONE(xor)
__MSL_ONE(prefix_inclusive_sum)
__MSL_ONE(prefix_exclusive_sum)
__MSL_ONE(prefix_inclusive_product)
__MSL_ONE(prefix_exclusive_product)
__MSL_ONE(broadcast_first)
#define __MSL_MOVED(name) \
  template <typename T> inline T simd_##name(T x, ushort lane) { return __msl::opaque(x, lane); } \
  template <typename T> inline T quad_##name(T x, ushort lane) { return __msl::opaque(x, lane); }
__MSL_MOVED(shuffle)
__MSL_MOVED(broadcast)
__MSL_MOVED(shuffle_xor)
__MSL_MOVED(shuffle_down)
__MSL_MOVED(shuffle_up)
__MSL_MOVED(shuffle_rotate_down)
__MSL_MOVED(shuffle_rotate_up)
inline simd_vote simd_ballot(bool x) { return {__msl::opaque((uint)x)}; }
inline simd_vote simd_active_threads_mask() { return {__msl::opaque(~0u)}; }
inline bool simd_all(bool x) { return __msl::opaque((uint)x) != 0; }
inline bool simd_any(bool x) { return __msl::opaque((uint)x) != 0; }
inline bool simd_is_first() { return __msl::__msl_lane() == 0; }

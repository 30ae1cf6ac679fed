// What the kernels (cpu_kernels.cpp, compiled once an instruction set) and their caller (cpu_shims.cpp) share.
#pragma once

#include <cstdint>

namespace gdn {

enum class Type : int32_t { f16, bf16, f32, f64 };

// A borrowed tensor of at most four dimensions; strides in elements.
struct Tensor {
  void* data = nullptr;  // null: the optional tensor is absent
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};
  Type type = Type::f32;
};

// q, k [B, T, H, K]; v, o [B, T, HV, V]; g, beta [B, T, HV]; states [N, HV, K, V]. o and final_state are contiguous.
// Without beta it is gated linear attention: all of v is written.
// bounds is null, or N + 1 checked token positions of the sequences packed along T (then B is 1).
struct GatedDeltaRule {
  Tensor q, k, v, g, beta, initial_state, o, final_state;
  const int64_t* bounds;
  int64_t sequences;
  double scale;
  bool chunked;
};

// x, y [B, T, D]; weight [D, W]; bias [D]; states [N, D, W - 1]. y and final_state are contiguous.
struct CausalConv1d {
  Tensor x, weight, bias, initial_state, y, final_state;
  const int64_t* bounds;
  int64_t sequences;
  bool silu;
};

// Both return false when memory for the working buffers cannot be had.
struct Kernels {
  bool (*gated_delta_rule)(const GatedDeltaRule&);
  bool (*causal_conv1d)(const CausalConv1d&);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace gdn

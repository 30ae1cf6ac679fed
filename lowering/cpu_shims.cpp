// The operators of namespace gdn as functions of AOTInductor's C interface: what generated code calls on CPU.
//
// The signatures follow Inductor's convention: a tensor is an AtenTensorHandle, an optional tensor a pointer to one (or
// null), a float a double, a bool an int32_t, results come last as pointers. Only libtorch's stable C functions are used,
// so the archive fits any libtorch of the same C interface. Bad input throws, through aoti_torch_check.

#include "cpu_kernels.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <new>
#include <vector>

namespace {

void check(bool condition, const char* function, const char* message) {
  if (!condition) aoti_torch_check(false, function, __FILE_NAME__, __LINE__, message);
}

#define GDN_CHECK(condition, message) check(condition, __func__, message)
#define GDN_CALL(call) GDN_CHECK((call) == AOTI_TORCH_SUCCESS, #call " failed")

gdn::Type type_of(AtenTensorHandle handle) {
  int32_t dtype = -1;
  GDN_CALL(aoti_torch_get_dtype(handle, &dtype));
  if (dtype == aoti_torch_dtype_float16()) return gdn::Type::f16;
  if (dtype == aoti_torch_dtype_bfloat16()) return gdn::Type::bf16;
  if (dtype == aoti_torch_dtype_float64()) return gdn::Type::f64;
  GDN_CHECK(dtype == aoti_torch_dtype_float32(), "expected a float16, bfloat16, float32 or float64 tensor");
  return gdn::Type::f32;
}

gdn::Tensor borrow(AtenTensorHandle handle) {
  gdn::Tensor tensor;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  GDN_CALL(aoti_torch_get_data_ptr(handle, &tensor.data));
  GDN_CALL(aoti_torch_get_dim(handle, &dim));
  GDN_CHECK(dim <= 4, "expected at most four dimensions");
  GDN_CALL(aoti_torch_get_sizes(handle, &sizes));
  GDN_CALL(aoti_torch_get_strides(handle, &strides));
  for (int64_t i = 0; i < dim; i++) tensor.size[i] = sizes[i], tensor.stride[i] = strides[i];
  tensor.type = type_of(handle);
  return tensor;
}

gdn::Tensor borrow(AtenTensorHandle* handle) { return handle ? borrow(*handle) : gdn::Tensor(); }

// A fresh contiguous tensor; the handle goes to the caller.
gdn::Tensor create(const std::vector<int64_t>& sizes, int32_t dtype, AtenTensorHandle* out) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  GDN_CALL(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, out));
  return borrow(*out);
}

int32_t dtype_of(AtenTensorHandle handle) {
  int32_t dtype = -1;
  GDN_CALL(aoti_torch_get_dtype(handle, &dtype));
  return dtype;
}

// cu_seqlens as int64, checked: from 0 to T without a step back. Empty without cu_seqlens.
std::vector<int64_t> read_bounds(AtenTensorHandle* cu_seqlens, int64_t T) {
  std::vector<int64_t> bounds;
  if (!cu_seqlens) return bounds;
  void* data = nullptr;
  int64_t size = 0, stride = 0;
  GDN_CALL(aoti_torch_get_data_ptr(*cu_seqlens, &data));
  GDN_CALL(aoti_torch_get_size(*cu_seqlens, 0, &size));
  GDN_CALL(aoti_torch_get_stride(*cu_seqlens, 0, &stride));
  bool narrow = dtype_of(*cu_seqlens) == aoti_torch_dtype_int32();
  GDN_CHECK(narrow || dtype_of(*cu_seqlens) == aoti_torch_dtype_int64(), "cu_seqlens: expected int32 or int64");
  for (int64_t i = 0; i < size; i++)
    bounds.push_back(narrow ? static_cast<int32_t*>(data)[i * stride] : static_cast<int64_t*>(data)[i * stride]);
  bool good = size >= 1 && bounds.front() == 0 && bounds.back() == T;
  for (int64_t i = 1; i < size; i++) good = good && bounds[i - 1] <= bounds[i];
  GDN_CHECK(good, "cu_seqlens: expected a non-decreasing list from 0 to T");
  return bounds;
}

const gdn::Kernels& kernels() {
#if defined(GDN_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return gdn::kernels_avx512;
#endif
#if defined(GDN_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return gdn::kernels_avx2;
#endif
  return gdn::kernels_baseline;
}

AOTITorchError rule(bool chunked, AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle g,
                    AtenTensorHandle* beta, AtenTensorHandle* initial_state, AtenTensorHandle* cu_seqlens, double scale,
                    int32_t output_final_state, AtenTensorHandle* o, AtenTensorHandle* final_state) {
  gdn::GatedDeltaRule op;
  op.q = borrow(q), op.k = borrow(k), op.v = borrow(v), op.g = borrow(g), op.beta = borrow(beta);
  op.initial_state = borrow(initial_state);
  std::vector<int64_t> bounds = read_bounds(cu_seqlens, op.q.size[1]);
  op.bounds = cu_seqlens ? bounds.data() : nullptr;
  op.sequences = cu_seqlens ? int64_t(bounds.size()) - 1 : op.q.size[0];
  op.scale = scale, op.chunked = chunked;
  op.o = create({op.v.size[0], op.v.size[1], op.v.size[2], op.v.size[3]}, dtype_of(v), o);
  int32_t dtype = op.q.type == gdn::Type::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  op.final_state = create(
      {output_final_state ? op.sequences : 0, op.v.size[2], op.q.size[3], op.v.size[3]}, dtype, final_state);
  if (!output_final_state) op.final_state.data = nullptr;
  GDN_CHECK(op.sequences == 0 || kernels().gated_delta_rule(op), "out of memory for the working buffers");
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_chunk_gated_delta_rule(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle g, AtenTensorHandle beta,
    AtenTensorHandle* initial_state, AtenTensorHandle* cu_seqlens, double scale, int32_t output_final_state,
    AtenTensorHandle* o, AtenTensorHandle* final_state) {
  return rule(true, q, k, v, g, &beta, initial_state, cu_seqlens, scale, output_final_state, o, final_state);
}

AOTITorchError aoti_torch_cpu_recurrent_gated_delta_rule(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle g, AtenTensorHandle beta,
    AtenTensorHandle* initial_state, AtenTensorHandle* cu_seqlens, double scale, int32_t output_final_state,
    AtenTensorHandle* o, AtenTensorHandle* final_state) {
  return rule(false, q, k, v, g, &beta, initial_state, cu_seqlens, scale, output_final_state, o, final_state);
}

AOTITorchError aoti_torch_cpu_chunk_gated_linear_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle g, AtenTensorHandle* initial_state,
    AtenTensorHandle* cu_seqlens, double scale, int32_t output_final_state, AtenTensorHandle* o,
    AtenTensorHandle* final_state) {
  return rule(true, q, k, v, g, nullptr, initial_state, cu_seqlens, scale, output_final_state, o, final_state);
}

AOTITorchError aoti_torch_cpu_recurrent_gated_linear_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle g, AtenTensorHandle* initial_state,
    AtenTensorHandle* cu_seqlens, double scale, int32_t output_final_state, AtenTensorHandle* o,
    AtenTensorHandle* final_state) {
  return rule(false, q, k, v, g, nullptr, initial_state, cu_seqlens, scale, output_final_state, o, final_state);
}

AOTITorchError aoti_torch_cpu_causal_conv1d(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* initial_state,
    AtenTensorHandle* cu_seqlens, int32_t silu, int32_t output_final_state, AtenTensorHandle* y,
    AtenTensorHandle* final_state) {
  gdn::CausalConv1d op;
  op.x = borrow(x), op.weight = borrow(weight), op.bias = borrow(bias), op.initial_state = borrow(initial_state);
  std::vector<int64_t> bounds = read_bounds(cu_seqlens, op.x.size[1]);
  op.bounds = cu_seqlens ? bounds.data() : nullptr;
  op.sequences = cu_seqlens ? int64_t(bounds.size()) - 1 : op.x.size[0];
  op.silu = silu;
  op.y = create({op.x.size[0], op.x.size[1], op.x.size[2]}, dtype_of(x), y);
  op.final_state = create(
      {output_final_state ? op.sequences : 0, op.x.size[2], op.weight.size[1] - 1}, dtype_of(x), final_state);
  if (!output_final_state) op.final_state.data = nullptr;
  GDN_CHECK(op.sequences == 0 || kernels().causal_conv1d(op), "out of memory for the working buffers");
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

// The gated delta rule, gated linear attention and the short causal convolution on CPU, without any dependency beyond
// the C library.
//
// Compiled once an instruction set: GDN_KERNELS names the exported table and GDN_VECTOR_BYTES the register width.
// Everything else has internal linkage, so that no inline function of one instruction set is linked into another.
//
// The rule, one task a (sequence, value head), chunks of 64 tokens, the state S [K, V] in a buffer of the task. With
// c = cumsum(g) inside the chunk and D_ij = exp(c_i - c_j):
//
//     (I + A) X = beta * (V - exp(c) * (K S)),   A_ij = beta_i (K K^T)_ij D_ij for j < i      (X: values written)
//     O = scale * (exp(c) * (Q S) + tril(Q K^T * D) X)
//     S <- exp(c_C) S + (exp(c_C - c) * K)^T X
//
// Gated linear attention is the same with X = V, without A and K S.
//
// Since chunks run in order, the solve needs V columns only (U and W of the batched form are never built). The matrix
// products share one register-tiled loop. c is summed in fp64; all else is fp32, or fp64 for fp64 inputs.
// Source of the formulas: arXiv 2412.06464, section 3.3.

#include "cpu_kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef GDN_KERNELS
#define GDN_KERNELS kernels_baseline
#define GDN_VECTOR_BYTES 16
#endif

namespace gdn {
namespace {

constexpr int64_t CHUNK = 64;

// ---- Storage types -------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

struct Bf16 {
  uint16_t bits;
  operator float() const { return from_bits(uint32_t(bits) << 16); }
  static Bf16 of(float x) {
    uint32_t b = to_bits(x);
    uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return {uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
  }
};

struct F16 {
  uint16_t bits;
  // Exponent and mantissa are moved into fp32's fields and rescaled by 2^112, which also normalises subnormals.
  operator float() const {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    float magnitude = rest >= 0x7c00 ? from_bits(0x7f800000 | (rest << 13)) : from_bits(rest << 13) * 0x1p112f;
    return from_bits(to_bits(magnitude) | sign);
  }
  static F16 of(float x) {
    uint32_t b = to_bits(x), sign = (b >> 16) & 0x8000, rest = b & 0x7fffffff;
    uint32_t half;
    if (rest > 0x7f800000)
      half = 0x7e00;
    else if (rest >= 0x477ff000)  // 65520 and above round to infinity
      half = 0x7c00;
    else if (rest < 0x38800000)  // subnormal in fp16: adding 0.5 leaves the rounded mantissa in the low bits
      half = to_bits(from_bits(rest) + 0.5f) - 0x3f000000;
    else
      half = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
    return {uint16_t(half | sign)};
  }
};

template <class S>
struct Store {
  template <class T>
  static S of(T x) { return S::of(float(x)); }
};
template <>
struct Store<float> {
  template <class T>
  static float of(T x) { return float(x); }
};
template <>
struct Store<double> {
  template <class T>
  static double of(T x) { return double(x); }
};

template <class S, class T>
inline void load_as(const void* data, int64_t offset, int64_t stride, int64_t n, T* out) {
  const S* x = static_cast<const S*>(data) + offset;
  if (stride == 1)
    for (int64_t i = 0; i < n; i++) out[i] = T(x[i]);
  else
    for (int64_t i = 0; i < n; i++) out[i] = T(x[i * stride]);
}

// n elements of x from `offset`, `stride` apart, as T.
template <class T>
void load(const Tensor& x, int64_t offset, int64_t stride, int64_t n, T* out) {
  switch (x.type) {
    case Type::f16: return load_as<F16>(x.data, offset, stride, n, out);
    case Type::bf16: return load_as<Bf16>(x.data, offset, stride, n, out);
    case Type::f32: return load_as<float>(x.data, offset, stride, n, out);
    case Type::f64: return load_as<double>(x.data, offset, stride, n, out);
  }
}

template <class S, class T>
inline void store_as(void* data, int64_t offset, int64_t stride, int64_t n, const T* in) {
  S* x = static_cast<S*>(data) + offset;
  if (stride == 1)
    for (int64_t i = 0; i < n; i++) x[i] = Store<S>::of(in[i]);
  else
    for (int64_t i = 0; i < n; i++) x[i * stride] = Store<S>::of(in[i]);
}

template <class T>
void store(const Tensor& x, int64_t offset, int64_t stride, int64_t n, const T* in) {
  switch (x.type) {
    case Type::f16: return store_as<F16>(x.data, offset, stride, n, in);
    case Type::bf16: return store_as<Bf16>(x.data, offset, stride, n, in);
    case Type::f32: return store_as<float>(x.data, offset, stride, n, in);
    case Type::f64: return store_as<double>(x.data, offset, stride, n, in);
  }
}

// ---- Matrix product ------------------------------------------------------------------------------------------------

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(GDN_VECTOR_BYTES)));
  static constexpr int64_t lanes = GDN_VECTOR_BYTES / sizeof(T);
  static constexpr int64_t tile = 2 * lanes;  // columns that the product handles at once
};

// Row length of a working matrix: whole tiles, plus one cache line so that a column of tiles spreads over cache sets.
template <class T>
constexpr int64_t padded(int64_t columns) {
  constexpr int64_t tile = 64 / sizeof(T) > Vector<T>::tile ? 64 / sizeof(T) : Vector<T>::tile;
  return (columns + tile - 1) / tile * tile + 64 / sizeof(T);
}

// R rows by one tile of c (+)= a b, accumulated in registers.
template <class T, int R>
inline __attribute__((always_inline)) void tile_product(
    int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes;
  V sum[R][2];
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++)
      if (add)
        memcpy(&sum[r][h], c + r * ldc + h * lanes, sizeof(V));
      else
        sum[r][h] = V{};
  for (int64_t p = 0; p < depth; p++) {
    V b0, b1;
    memcpy(&b0, b + p * ldb, sizeof(V));
    memcpy(&b1, b + p * ldb + lanes, sizeof(V));
    for (int r = 0; r < R; r++) {
      T x = a[r * a_row + p * a_col];
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
  }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) memcpy(c + r * ldc + h * lanes, &sum[r][h], sizeof(V));
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; a has any strides, b and c are working matrices (padded
// rows: whole tiles are read and written).
template <class T>
void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b,
             int64_t ldb, T* c, int64_t ldc, bool add) {
  constexpr int R = GDN_VECTOR_BYTES == 64 ? 8 : 4;
  for (int64_t j = 0; j < columns; j += Vector<T>::tile) {
    int64_t i = 0;
    for (; i + R <= rows; i += R)
      tile_product<T, R>(depth, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, add);
    for (; i < rows; i++)
      tile_product<T, 1>(depth, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, add);
  }
}

// ---- The gated delta rule ------------------------------------------------------------------------------------------

inline float exponential(float x) { return expf(x); }
inline double exponential(double x) { return exp(x); }

// The working buffers of one thread, carved from one block.
template <class T>
struct Work {
  int64_t ldk, ldv, ldc;
  T *S = nullptr, *row = nullptr;
  T *q = nullptr, *k = nullptr, *kT = nullptr, *x = nullptr, *o = nullptr, *P = nullptr, *A = nullptr;
  void* block;

  // Without `chunks` (decode) only the state and single rows: small enough that the allocator keeps the memory at hand.
  Work(int64_t K, int64_t V, bool chunks) : ldk(padded<T>(K)), ldv(padded<T>(V)), ldc(padded<T>(CHUNK)) {
    int64_t n = K * ldv + 2 * ldk + 2 * ldv;
    if (chunks) n += 2 * CHUNK * (ldk + ldv + ldc) + K * ldc;
    size_t bytes = (size_t(n) * sizeof(T) + 63) / 64 * 64;
    block = aligned_alloc(64, bytes);
    if (!block) return;
    if (chunks) memset(block, 0, bytes);  // the padding of rows is read, so it must hold numbers
    T* next = static_cast<T*>(block);
    auto take = [&next](int64_t count) {
      T* here = next;
      next += count;
      return here;
    };
    S = take(K * ldv), row = take(2 * ldk + 2 * ldv);
    if (!chunks) return;
    q = take(CHUNK * ldk), k = take(CHUNK * ldk), kT = take(K * ldc);
    x = take(CHUNK * ldv), o = take(CHUNK * ldv);
    P = take(CHUNK * ldc), A = take(CHUNK * ldc);
  }
  ~Work() { free(block); }
  Work(const Work&) = delete;
};

// One (sequence, value head): where its tokens lie.
struct Task {
  int64_t batch, head, key_head, start, length, sequence;
};

inline int64_t at(const Tensor& x, const Task& task, int64_t t, int64_t head) {
  return task.batch * x.stride[0] + t * x.stride[1] + head * x.stride[2];
}

template <class T>
void load_state(const GatedDeltaRule& op, const Task& task, T* S, int64_t ld) {
  int64_t K = op.q.size[3], V = op.v.size[3];
  const Tensor& from = op.initial_state;
  for (int64_t d = 0; d < K; d++) {
    if (from.data)
      load(from, task.sequence * from.stride[0] + task.head * from.stride[1] + d * from.stride[2], from.stride[3], V,
           S + d * ld);
    else
      memset(S + d * ld, 0, V * sizeof(T));
  }
}

// Token by token; the state is contiguous at S with row length ld.
template <class T>
void recurrent(const GatedDeltaRule& op, const Task& task, T* S, int64_t ld, const Work<T>& work) {
  int64_t K = op.q.size[3], V = op.v.size[3];
  T *q = work.row, *k = q + work.ldk, *v = k + work.ldk, *o = v + work.ldv;
  for (int64_t t = task.start; t < task.start + task.length; t++) {
    T g, beta;
    load(op.q, at(op.q, task, t, task.key_head), op.q.stride[3], K, q);
    load(op.k, at(op.k, task, t, task.key_head), op.k.stride[3], K, k);
    load(op.v, at(op.v, task, t, task.head), op.v.stride[3], V, v);
    load(op.g, at(op.g, task, t, task.head), 1, 1, &g);
    T decay = exponential(g), scale = T(op.scale);
    if (op.beta.data) {
      load(op.beta, at(op.beta, task, t, task.head), 1, 1, &beta);
      memset(o, 0, V * sizeof(T));
      for (int64_t d = 0; d < K; d++) {
        const T* row = S + d * ld;
        T kd = k[d];
        for (int64_t j = 0; j < V; j++) o[j] += kd * row[j];
      }
      for (int64_t j = 0; j < V; j++) v[j] = beta * (v[j] - decay * o[j]);
    }
    memset(o, 0, V * sizeof(T));
    for (int64_t d = 0; d < K; d++) {
      T* row = S + d * ld;
      T kd = k[d], qd = q[d] * scale;
      for (int64_t j = 0; j < V; j++) {
        T s = decay * row[j] + kd * v[j];
        row[j] = s;
        o[j] += qd * s;
      }
    }
    store(op.o, at(op.o, task, t, task.head), 1, V, o);
  }
}

// One chunk of n tokens from t; advances work.S.
template <class T>
void chunk(const GatedDeltaRule& op, const Task& task, int64_t t, int64_t n, const Work<T>& w) {
  constexpr int64_t BLOCK = 32, STEP = 8;
  int64_t K = op.q.size[3], V = op.v.size[3], ldk = w.ldk, ldv = w.ldv, ldc = w.ldc;
  double c[CHUNK], sum = 0;
  T beta[CHUNK], scale = T(op.scale);
  const bool erases = op.beta.data;
  for (int64_t i = 0; i < n; i++) {
    double g;
    load(op.q, at(op.q, task, t + i, task.key_head), op.q.stride[3], K, w.q + i * ldk);
    load(op.k, at(op.k, task, t + i, task.key_head), op.k.stride[3], K, w.k + i * ldk);
    load(op.g, at(op.g, task, t + i, task.head), 1, 1, &g);
    if (erases) load(op.beta, at(op.beta, task, t + i, task.head), 1, 1, beta + i);
    // Below this a gate is an exact zero in fp64 too; -inf itself would leave differences that are not numbers.
    c[i] = sum += g < -1000 ? -1000 : g;
  }
  for (int64_t d = 0; d < K; d++) {
    for (int64_t i = 0; i < n; i++) w.kT[d * ldc + i] = w.k[i * ldk + d];
    for (int64_t i = n; i < CHUNK; i++) w.kT[d * ldc + i] = 0;
  }
  for (int64_t i = 0; i < n; i += BLOCK) {
    int64_t rows = n - i < BLOCK ? n - i : BLOCK;
    if (erases) product(rows, i + BLOCK, K, w.k + i * ldk, ldk, 1, w.kT, ldc, w.A + i * ldc, ldc, false);
    product(rows, i + BLOCK, K, w.q + i * ldk, ldk, 1, w.kT, ldc, w.P + i * ldc, ldc, false);
  }
  for (int64_t i = 0; i < n; i++) {
    T *A = w.A + i * ldc, *P = w.P + i * ldc;
    for (int64_t j = 0; j <= i; j++) {
      T D = exponential(T(c[i] - c[j]));
      if (erases) A[j] *= -beta[i] * D;
      P[j] *= scale * D;
    }
    for (int64_t j = i + 1; j < CHUNK; j++) P[j] = 0;
  }
  if (erases) product(n, V, K, w.k, ldk, 1, w.S, ldv, w.x, ldv, false);
  product(n, V, K, w.q, ldk, 1, w.S, ldv, w.o, ldv, false);
  for (int64_t i = 0; i < n; i++) {
    T *x = w.x + i * ldv, *o = w.o + i * ldv, *v = w.row;
    T decay = T(exponential(c[i]));
    load(op.v, at(op.v, task, t + i, task.head), op.v.stride[3], V, erases ? v : x);
    if (erases)
      for (int64_t j = 0; j < V; j++) x[j] = beta[i] * (v[j] - decay * x[j]);
    for (int64_t j = 0; j < V; j++) o[j] *= scale * decay;
  }
  for (int64_t i = 0; erases && i < n; i += STEP) {  // forward substitution by blocks of STEP rows
    int64_t end = i + STEP < n ? i + STEP : n;
    if (i) product(end - i, V, i, w.A + i * ldc, ldc, 1, w.x, ldv, w.x + i * ldv, ldv, true);
    for (int64_t r = i + 1; r < end; r++) {
      T* x = w.x + r * ldv;
      for (int64_t s = i; s < r; s++) {
        T a = w.A[r * ldc + s];
        const T* y = w.x + s * ldv;
        for (int64_t j = 0; j < V; j++) x[j] += a * y[j];
      }
    }
  }
  for (int64_t i = 0; i < n; i += BLOCK) {
    int64_t rows = n - i < BLOCK ? n - i : BLOCK;
    product(rows, V, i + rows, w.P + i * ldc, ldc, 1, w.x, ldv, w.o + i * ldv, ldv, true);
  }
  for (int64_t i = 0; i < n; i++) {
    T to_end = T(exponential(c[n - 1] - c[i]));
    for (int64_t d = 0; d < K; d++) w.k[i * ldk + d] *= to_end;
    store(op.o, at(op.o, task, t + i, task.head), 1, V, w.o + i * ldv);
  }
  T whole = T(exponential(c[n - 1]));
  for (int64_t d = 0; d < K; d++)
    for (int64_t j = 0; j < V; j++) w.S[d * ldv + j] *= whole;
  product(K, V, n, w.k, 1, ldk, w.x, ldv, w.S, ldv, true);
}

template <class T>
void run_task(const GatedDeltaRule& op, const Task& task, const Work<T>& work) {
  int64_t K = op.q.size[3], V = op.v.size[3];
  T* final_state = static_cast<T*>(op.final_state.data);
  if (final_state) final_state += (task.sequence * op.v.size[2] + task.head) * K * V;
  if (!op.chunked || task.length <= 1) {
    T* S = final_state ? final_state : work.S;
    int64_t ld = final_state ? V : work.ldv;
    load_state(op, task, S, ld);
    recurrent(op, task, S, ld, work);
    return;
  }
  load_state(op, task, work.S, work.ldv);
  for (int64_t t = 0; t < task.length; t += CHUNK)
    chunk(op, task, task.start + t, task.length - t < CHUNK ? task.length - t : CHUNK, work);
  if (final_state)
    for (int64_t d = 0; d < K; d++) memcpy(final_state + d * V, work.S + d * work.ldv, V * sizeof(T));
}

template <class T>
bool gated_delta_rule_in(const GatedDeltaRule& op) {
  int64_t K = op.q.size[3], V = op.v.size[3], HV = op.v.size[2], group = HV / op.q.size[2];
  int64_t tasks = op.sequences * HV;
  bool enough = true;
#pragma omp parallel if (tasks > 1)
  {
    Work<T> work(K, V, op.chunked && op.q.size[1] > 1);
    if (!work.block) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; i++) {
      if (!work.block) continue;
      int64_t n = i / HV, head = i % HV;
      Task task{n, head, head / group, 0, op.q.size[1], n};
      if (op.bounds) {
        task.batch = 0;
        task.start = op.bounds[n];
        task.length = op.bounds[n + 1] - op.bounds[n];
      }
      run_task(op, task, work);
    }
  }
  return enough;
}

bool gated_delta_rule(const GatedDeltaRule& op) {
  return op.q.type == Type::f64 ? gated_delta_rule_in<double>(op) : gated_delta_rule_in<float>(op);
}

// ---- The short causal convolution ----------------------------------------------------------------------------------

// x * sigmoid(x). The float form is a polynomial that vectorises: exp(-x) = 2^n e^r, |r| <= ln(2) / 2, error < 2 ulp.
inline void silu(double* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = y[i] / (1 + exp(-y[i]));
}

inline void silu(float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float x = -y[i], numerator = x > 88.0f ? 0.0f : y[i];  // below -88 the result is under 2e-36
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float k = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    y[i] = numerator / (1.0f + p * from_bits(uint32_t(int32_t(k) + 127) << 23));
  }
}

// Row t of the input of one sequence as T: the initial state before the first token, zeros without one.
template <class T>
void load_row(const CausalConv1d& op, int64_t batch, int64_t n, int64_t start, int64_t t, int64_t before, T* row) {
  int64_t D = op.x.size[2];
  const Tensor& from = op.initial_state;
  if (t >= 0)
    load(op.x, batch * op.x.stride[0] + (start + t) * op.x.stride[1], op.x.stride[2], D, row);
  else if (from.data)
    load(from, n * from.stride[0] + (t + before) * from.stride[2], from.stride[1], D, row);
  else
    memset(row, 0, D * sizeof(T));
}

// Tokens [t, end) of sequence n; rows is a ring of W input rows followed by one output row.
template <class T>
void convolve(const CausalConv1d& op, int64_t batch, int64_t n, int64_t start, int64_t t, int64_t end,
              const T* weight, T* rows) {
  int64_t D = op.x.size[2], W = op.weight.size[1];
  T* y = rows + W * D;
  const T* bias = weight + W * D;
  for (int64_t i = 1; i < W; i++) load_row(op, batch, n, start, t - W + i, W - 1, rows + ((t + i) % W) * D);
  for (; t < end; t++) {  // input row s sits in slot (s + W) % W
    load_row(op, batch, n, start, t, W - 1, rows + (t % W) * D);
    memcpy(y, bias, D * sizeof(T));
    for (int64_t i = 0; i < W; i++) {
      const T *x = rows + ((t + 1 + i) % W) * D, *w = weight + i * D;
      for (int64_t d = 0; d < D; d++) y[d] += w[d] * x[d];
    }
    if (op.silu) silu(y, D);
    store(op.y, batch * op.y.stride[0] + (start + t) * op.y.stride[1], 1, D, y);
  }
}

template <class T>
bool causal_conv1d_in(const CausalConv1d& op) {
  int64_t D = op.x.size[2], W = op.weight.size[1], T_all = op.x.size[1];
  int64_t blocks = (T_all + CHUNK - 1) / CHUNK;
  T* weight = static_cast<T*>(malloc(sizeof(T) * size_t((W + 1) * D + 1)));  // [W, D], then the bias
  if (!weight) return false;
  for (int64_t i = 0; i < W; i++)
    load(op.weight, i * op.weight.stride[1], op.weight.stride[0], D, weight + i * D);
  if (op.bias.data)
    load(op.bias, 0, op.bias.stride[0], D, weight + W * D);
  else
    memset(weight + W * D, 0, D * sizeof(T));
  bool enough = true;
#pragma omp parallel if (op.sequences * T_all > CHUNK)
  {
    T* rows = static_cast<T*>(malloc(sizeof(T) * size_t((W + 1) * D + 1)));
    if (!rows) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < op.sequences * (blocks + 1); i++) {
      if (!rows) continue;
      int64_t n = i / (blocks + 1), block = i % (blocks + 1), batch = n, start = 0, length = T_all;
      if (op.bounds) batch = 0, start = op.bounds[n], length = op.bounds[n + 1] - start;
      if (block < blocks) {
        int64_t t = block * CHUNK, end = t + CHUNK < length ? t + CHUNK : length;
        if (t < end) convolve(op, batch, n, start, t, end, weight, rows);
      } else if (op.final_state.data) {
        for (int64_t j = 0; j < W - 1; j++) {
          load_row(op, batch, n, start, length - (W - 1) + j, W - 1, rows);
          store(op.final_state, n * D * (W - 1) + j, W - 1, D, rows);
        }
      }
    }
    free(rows);
  }
  free(weight);
  return enough;
}

bool causal_conv1d(const CausalConv1d& op) {
  return op.x.type == Type::f64 ? causal_conv1d_in<double>(op) : causal_conv1d_in<float>(op);
}

}  // namespace

extern const Kernels GDN_KERNELS;
const Kernels GDN_KERNELS = {gated_delta_rule, causal_conv1d};

}  // namespace gdn

// What the kernels are told about a layer: shapes, offset tables, and the services of the host program.
//
// Letters: B samples, C channels in, O out, K kernel positions, T output positions, R = (C/groups)·K rows of a sample's
// gradient. Space has three dimensions here; one- and two-dimensional layers carry leading ones.
//
// Implicit im2col is separable: in a zero-padded copy of x the patch is U[r, t] = x_padded[tap[r] + pos[t]], so a patch
// matrix is two short tables and is never stored.

#pragma once

#include <cstddef>
#include <cstdint>

namespace bootgrad {

enum class DType { f32, f64, bf16, f16 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// Services of the host: a pool of threads and memory that each thread keeps from call to call.
struct Runtime {
  // Calls work(ctx) once on each of up to `threads` threads.
  void (*parallel)(int64_t threads, void (*work)(void*), void* ctx);
  int64_t (*threads)();
  // Memory of the calling thread, 64-byte aligned, unspecified content; valid until its next call with the same slot.
  void* (*scratch)(int slot, size_t bytes);
};

// Slots of Runtime::scratch: what a worker needs for its samples, and what the calling thread keeps for all workers.
constexpr int kWorkerScratch = 0;
constexpr int kSharedScratch = 1;
constexpr int kCenterScratch = 2;

// The pixels of x that meet the same kernel positions: those congruent modulo the stride.
struct Phase {
  int64_t pixels;        // M
  int64_t taps;          // kernel positions that reach them
  int64_t first_tap;     // position of the first of them in ConvPlan::tap_order
  int64_t first_pixel;   // number of the first pixel in x
  const int64_t* rows;   // [pixels]  offset of the pixel in the padded gy
  const int64_t* out;    // [pixels]  number of the pixel in x, counted from the first
  const int64_t* depth;  // [taps·Og] offset of (tap, o) in the padded gy
};

struct ConvPlan {
  int64_t B, C, O, groups, Cg, Og, K, T, R;
  int64_t pixels;      // positions of x
  bool channels_last;  // x is (B, T, C) and gy (B, T, O): a linear layer, which has one kernel position
  bool pixel_gram;     // stride 1, every pixel in a patch: patch Grams are sums of shifted pixel Grams
  int64_t S[3], P[3];  // spatial size of x and of gy
  int64_t kernel[3], stride[3], padding[3], dilation[3];
  int64_t xs[3], x_plane;           // padded size of x, their product
  int64_t gs[3], glow[3], g_plane;  // padded size of gy, its margin in front, product
  const int64_t* tap;               // [R] offset of (c, k) in a group's padded x
  const int64_t* pos;               // [T] offset of t in the padded x
  // Where dx is wanted; else gy has no margins either.
  const int64_t* tap_order;  // [reached] kernel positions that reach pixels, those of one phase together
  int64_t reached, n_phases;
  const Phase* phases;
  // On the Gram path, for shifts or for dx; the last for both.
  const int64_t* pixel;     // [pixels] offset of a pixel in a padded plane of x
  const int64_t* at_pixel;  // [x_plane] number of the pixel at an offset, −1 in the margin
  const int64_t* at_pos;    // [x_plane] number t of the position at an offset, −1 where there is none
};

struct ConvCall {
  const ConvPlan* plan;
  const Runtime* runtime;
  DType dtype;
  bool gram;
  const void* x;       // (B, C, *S), or (B, T, C) with channels last
  const void* gy;      // (B, O, *S'), or (B, T, O)
  const void* center;  // (O, C/groups, *K) or null
  const void* w;       // (B,) or null
  // Results; null where not wanted or without elements.
  void* sum;        // (O, C/groups, *K)  Σ_i w_i G_i
  void* sq_norms;   // (B,)  ‖G_i‖²
  void* deviation;  // (B,)  ‖G_i − center‖²
  void* inner;      // (B,)  ⟨G_i, center⟩
  void* bias;       // (B, O)  Σ_t gy
  void* dx;         // as x   scale times the derivative of ‖G_i − center‖²
  void* dgy;        // as gy
  double scale = 1;
  // The bias belongs to G_i, and its part of the center is this, (O,), or null for zeros; with one kind of norm and
  // `bias`, without `w` and channels last.
  bool biased;
  const void* bias_center;
  // Where there is h, dgy = G_i ∗ h for h as x, or dx = G_iᵀ ∗ h for h as gy, and no other result.
  const void* h;
  double factor;      // with a center, center + factor·G_i takes the place of G_i, on the direct path
  const void* shift;  // (B, O) or null, added to every position of dgy; of a convolution's own weights, (O,)
};

// A convolution in float32, y = W ∗ x + bias; or where there is dx, the gradient by x, dx = Wᵀ ∗ gy.
struct ConvProductCall {
  const ConvPlan* plan;
  const Runtime* runtime;
  const void* weight;    // (O, C/groups, *K)
  const void *x, *bias;  // (B, C, *S), and (O,) or null
  const void* gy;        // (B, O, *S')
  void *y, *dx;          // as gy, as x
};

struct GroupNormCall {
  const Runtime* runtime;
  DType dtype;
  int64_t B, C, groups, N;  // N positions of a channel
  const void *x, *gy, *u;   // (B, C, N); u, the cotangent of dx, or null
  const void* z;            // (B, C, N): the output of a ReLU behind the norm, or null
  // Of the compute type: mean and rstd (B, groups), weight (C,) or null, cotangents of the rows a and b (B, C) or null.
  const void *mean, *rstd, *weight, *a, *b;
  void *rows, *bias_rows;  // (B, C)
  void *dx, *dgy;          // (B, C, N)
};

struct MaxPoolCall {
  const Runtime* runtime;
  DType dtype;
  int64_t planes, S[2], P[2];  // spatial size of x and of y
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const void* x;  // [planes, S]
  void* y;        // [planes, P]
  void* index;    // [planes, P] int64: where the maximum is in its plane
};

// The adjoints of max pooling: out at index += in, or out = in at index.
struct MaxPoolGradCall {
  const Runtime* runtime;
  DType dtype;
  int64_t planes, size, windows;  // entries of a plane of x, and of y
  bool gather;
  const void* in;        // [planes, windows], or [planes, size] to gather from
  const int64_t* index;  // [planes, windows], checked
  const bool* blocked;   // [planes, windows] or null: where nothing passes
  void* out;             // [planes, size], or [planes, windows]
};

// A convolution of a 3×3 kernel, stride 1, in float32, between x (B, C, *S) and positions P of its output.
struct WinogradLayer {
  const Runtime* runtime;
  int64_t B, C, O;
  int64_t S[2], P[2], padding[2];
  const void* x;
};

// Its output (B, O, *P).
struct WinogradCall : WinogradLayer {
  const void* weight;
  bool transposed;   // the weight is (C, O, 3, 3), and turned around
  const void* bias;  // (O,) or null
  void* out;
};

// Its weight gradient Σ_i w_i G_i, (O, C, 3, 3).
struct WinogradSumCall : WinogradLayer {
  const void* gy;
  const void* w;  // (B,) or null
  void* out;
};

// Pairs of tensors of one dtype, cut into blocks that are numbered through.
constexpr int64_t kDistanceBlock = int64_t{1} << 15;

struct SqDistancesCall {
  const Runtime* runtime;
  DType dtype;
  int64_t tensors;
  const void* const* a;
  const void* const* b;                // null for zeros
  const int64_t *sizes, *first_block;  // [tensors], [tensors + 1]
  double scale;
  double* out;  // [tensors]  ‖scale·a_k − b_k‖²
};

// Look-ups in a table of V rows, E_i = Σ_n onehot(token_n) ⊗ gy_n over sample i's; one kind of result.
struct EmbeddingCall {
  const Runtime* runtime;
  DType dtype;
  int64_t B, N, D, V;
  const int64_t *tokens, *bounds;  // [N] less than V where there is a table, negative for none; [B + 1] from 0 to N
  const void* gy;                  // [N, D]
  const void* center;              // [V, D] or null
  const void* w;                   // [B] or null
  void *sq_norms, *rows;           // [B]  ‖E_i − center‖²; [N, D] or null  the look-ups' rows of E_i − center
  void* inner;                     // [B]  ⟨E_i, center⟩
  void* sum;                       // [V, D], zeros  Σ_i w_i E_i
};

// The second derivative of attention: L queries, S keys, D features of them and Dv of values.
struct AttentionCall {
  // One row of features for each (sample, head, position), or null for zeros; strides in elements.
  struct Rows {
    const void* data;
    int64_t stride[3];
  };
  const Runtime* runtime;
  DType dtype;
  int64_t N, H, L, S, D, Dv;
  Rows uq, uk, uv, g, q, k, v;
  const void* mask;  // added to the scores, (N, H, L, S) of the compute type, or null
  int64_t mask_stride[4];
  bool is_causal;
  double scale;
  void *dg, *dq, *dk, *dv;  // (N, L, H, Dv), (N, L, H, D), (N, S, H, D), (N, S, H, Dv)
};

// One instruction set's implementations.
struct Kernels {
  const char* name;
  void (*conv)(const ConvCall&);
  void (*conv_product)(const ConvProductCall&);
  // out[b] = ‖x_b‖² ‖gy_b‖² for x (B, I) and gy (B, O)
  void (*rank1)(const Runtime&, DType, const void* x, const void* gy, int64_t B, int64_t I, int64_t O, void* out);
  // the double backward pass where there is dgy, else the backward pass
  void (*group_norm)(const GroupNormCall&);
  void (*max_pool)(const MaxPoolCall&);
  // False where an index is out of its plane.
  bool (*max_pool_grad)(const MaxPoolGradCall&);
  void (*winograd)(const WinogradCall&);
  void (*winograd_sum)(const WinogradSumCall&);
  void (*sq_distances)(const SqDistancesCall&);
  void (*embedding)(const EmbeddingCall&);
  void (*attention_double_backward)(const AttentionCall&);
};

}  // namespace bootgrad

// The second derivative of attention against its formulas in plain loops.

#pragma once

#include "checking.hpp"

namespace {

// Rows of `columns` for (sample, head, position), stored as (N, length, H, columns) with a margin behind each row.
template <class In>
struct Heads {
  int64_t H, length, columns;
  std::vector<In> numbers;

  Heads(int64_t N, int64_t H, int64_t length, int64_t columns)
      : H(H), length(length), columns(columns), numbers(draw<In>(N * length * H * (columns + 1))) {}
  AttentionCall::Rows rows() const {
    return {numbers.data(), {length * H * (columns + 1), columns + 1, H * (columns + 1)}};
  }
  double operator()(int64_t n, int64_t h, int64_t l, int64_t d) const {
    return value(numbers[static_cast<size_t>(((n * length + l) * H + h) * (columns + 1) + d)]);
  }
};

struct Matrix {
  int64_t columns;
  Doubles numbers;
  Matrix(int64_t rows, int64_t columns) : columns(columns), numbers(static_cast<size_t>(rows * columns), 0.0) {}
  double& operator()(int64_t r, int64_t c) { return numbers[static_cast<size_t>(r * columns + c)]; }
};

// A row less its mean under the weights P, times these weights if so asked.
inline void center(Matrix& rows, Matrix& P, int64_t row, bool weigh) {
  double mean = 0;
  for (int64_t s = 0; s < P.columns; ++s) mean += P(row, s) * rows(row, s);
  for (int64_t s = 0; s < P.columns; ++s) rows(row, s) = (weigh ? P(row, s) : 1) * (rows(row, s) - mean);
}

// Of L queries, S keys, D features of them and Dv of values: plain, masked, causal, without some cotangents.
template <class In>
void check_attention(int64_t N, int64_t H, int64_t L, int64_t S, int64_t D, int64_t Dv) {
  using T = tested::Compute<In>;
  using F = Format<In>;
  const Heads<In> q(N, H, L, D), k(N, H, S, D), v(N, H, S, Dv), g(N, H, L, Dv), uq(N, H, L, D), uk(N, H, S, D),
      uv(N, H, S, Dv);
  std::vector<T> mask =
      draw<T>(N * L * S);  // the same for all heads; a query without a key, and keys that are left out
  for (size_t i = 0; i < mask.size(); ++i)
    if (static_cast<int64_t>(i) / (S > 0 ? S : 1) % 3 == 1 || i % 5 == 2) mask[i] = -static_cast<T>(__builtin_inf());
  const double s = 0.4;
  for (int kind = 0; kind < 4; ++kind) {
    const bool masked = kind == 1, causal = kind > 1, given = kind != 3;  // without u_Q and u_V
    Doubles dg(static_cast<size_t>(N * L * H * Dv), 0.0), dq(static_cast<size_t>(N * L * H * D), 0.0),
        dk(static_cast<size_t>(N * S * H * D), 0.0), dv(static_cast<size_t>(N * S * H * Dv), 0.0);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t h = 0; h < H; ++h) {
        Matrix P(L, S), A(L, S), A_apart(L, S), tangent(L, S), E(L, S);
        for (int64_t l = 0; l < L; ++l) {
          double total = 0;
          for (int64_t j = 0; j < S; ++j) {
            double score = 0;
            for (int64_t d = 0; d < D; ++d) {
              score += s * q(n, h, l, d) * k(n, h, j, d);
              tangent(l, j) += s * ((given ? uq(n, h, l, d) * k(n, h, j, d) : 0) + q(n, h, l, d) * uk(n, h, j, d));
            }
            if (masked) score += static_cast<double>(mask[static_cast<size_t>((n * L + l) * S + j)]);
            total += P(l, j) = causal && j > l ? 0 : std::exp(score);
            for (int64_t d = 0; d < Dv; ++d) {
              A(l, j) += g(n, h, l, d) * v(n, h, j, d);
              E(l, j) += given ? g(n, h, l, d) * uv(n, h, j, d) : 0;
            }
          }
          for (int64_t j = 0; j < S; ++j) P(l, j) /= total > 0 ? total : 1, A_apart(l, j) = A(l, j);
          center(A_apart, P, l, false), center(A, P, l, true);
          Matrix apart = tangent;
          center(apart, P, l, false), center(tangent, P, l, true);
          for (int64_t j = 0; j < S; ++j) E(l, j) += apart(l, j) * A_apart(l, j);
          center(E, P, l, true);
          const auto place = [&](int64_t length, int64_t position, int64_t columns, int64_t d) {
            return static_cast<size_t>(((n * length + position) * H + h) * columns + d);
          };
          for (int64_t j = 0; j < S; ++j) {
            for (int64_t d = 0; d < Dv; ++d) {
              dg[place(L, l, Dv, d)] += tangent(l, j) * v(n, h, j, d) + (given ? P(l, j) * uv(n, h, j, d) : 0);
              dv[place(S, j, Dv, d)] += tangent(l, j) * g(n, h, l, d);
            }
            for (int64_t d = 0; d < D; ++d) {
              dq[place(L, l, D, d)] += s * (A(l, j) * uk(n, h, j, d) + E(l, j) * k(n, h, j, d));
              dk[place(S, j, D, d)] += s * ((given ? A(l, j) * uq(n, h, l, d) : 0) + E(l, j) * q(n, h, l, d));
            }
          }
        }
      }
    std::vector<double> bits[2];
    for (const int64_t threads : {1, 3}) {
      n_threads = threads;
      std::vector<In> out[4];
      const Doubles* expected[4] = {&dg, &dq, &dk, &dv};
      for (int i = 0; i < 4; ++i) out[i].resize(expected[i]->size());
      AttentionCall call{};
      call.runtime = &runtime, call.dtype = F::dtype;
      call.N = N, call.H = H, call.L = L, call.S = S, call.D = D, call.Dv = Dv;
      call.q = q.rows(), call.k = k.rows(), call.v = v.rows(), call.g = g.rows(), call.uk = uk.rows();
      if (given) call.uq = uq.rows(), call.uv = uv.rows();
      if (masked) call.mask = mask.data();
      call.mask_stride[0] = L * S, call.mask_stride[2] = S, call.mask_stride[3] = 1;
      call.is_causal = causal, call.scale = s;
      call.dg = out[0].data(), call.dq = out[1].data(), call.dk = out[2].data(), call.dv = out[3].data();
      tested::attention_double_backward(call);
      const char* names[] = {"attention's dgO", "attention's dq", "attention's dk", "attention's dv"};
      for (int i = 0; i < 4; ++i) {
        compare(names[i], out[i], *expected[i], 2 * F::elements, 1.0);
        for (const In e : out[i]) bits[threads > 1].push_back(value(e));
      }
    }
    if (bits[0] != bits[1]) std::printf("attention: other bits with other threads\n"), ++failures;
  }
}

}  // namespace

// The direct path: a sample's gradient is formed tile by tile, used in registers, and, where derivatives are wanted,
// kept for the two products that they take.
//
//   G[r, o]        = Σ_t x[tap r + pos t] · gy[t, o]
//   ∂s/∂gy[t, o]   = 2 Σ_r x[pos t + tap r] · D[r, o]                 D = G − center
//   ∂s/∂x[p, c]    = 2 Σ_{k,o} gy[(p + padding − dilation·k)/stride, o] · D[(c,k), o]
//
// The last is a sum over the kernel positions that reach pixel p, the same for all pixels of one phase (p modulo the
// stride), so it is the same kind of product as the others.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct ConvDirect : ConvLayer<In> {
  using Layer = ConvLayer<In>;
  using Layer::call, Layer::plan, Layer::runtime, Layer::ld, Layer::ldc;
  using typename Layer::T;

  explicit ConvDirect(const ConvCall& c) : Layer(c, true) {}

  struct Memory {
    T *x, *gyt, *gyp, *keep, *keep_t, *dgyt, *dxt;
  };

  void run() const {
    // With a sum, a task is a block of samples with its own partial sum; else it is a sample.
    const int64_t weights = this->weights;
    const int64_t blocks = call.sum ? divide<T>(plan.B, 256, plan.groups, weights, ld).blocks : plan.B;
    T* partial = nullptr;
    if (call.sum)
      partial = static_cast<T*>(runtime.scratch(kSharedScratch, static_cast<size_t>(blocks * weights) * sizeof(T)));
    share(
        runtime, blocks, [&](Carver& c) { return lay_out(c); }, [&](const Memory& m) { zero_margins(m); },
        [&](int64_t block, const Memory& m) {
          const Range range = part(plan.B, blocks, block);
          for (int64_t b = range.begin; b < range.end; ++b)
            sample(b, m, call.sum ? partial + block * weights : nullptr, b == range.begin);
        });
    if (call.sum) combine_groups(*this, partial, blocks);
  }

 private:
  Memory lay_out(Carver& c) const {
    Memory m{};
    if (this->copy_x) m.x = c.take<T>(this->x_size);
    m.gyt = c.take<T>(this->gyt_size);
    if (call.dx || call.dgy) m.keep = c.take<T>(plan.R * ld);
    if (call.dgy) m.dgyt = c.take<T>(plan.T * ld);
    if (call.dx) {
      if (this->copy_gy) m.gyp = c.take<T>(this->gy_size);
      m.keep_t = c.take<T>(plan.K * plan.Og * ldc);
      m.dxt = c.take<T>(plan.pixels * ldc);
    }
    return m;
  }

  void zero_margins(const Memory& m) const {
    if (m.x) clear(m.x, this->x_size);
    if (m.gyp) clear(m.gyp, this->gy_size);
    if (ld != plan.Og) clear(m.gyt, this->gyt_size);
    if (m.keep_t && ldc != plan.Cg) clear(m.keep_t, plan.K * plan.Og * ldc);
  }

  void sample(int64_t b, const Memory& m, T* sum, bool first) const {
    const T* x = this->padded_x(b, m.x);
    this->transposed_gy(b, m.gyt);
    const T* gy = call.dx ? this->padded_gy(b, m.gyp) : nullptr;
    Total<T> plain, deviation;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const T* xg = x + g * this->x_group();
      const Norms<T> norms{ld,
                           this->center_of(g),
                           sum ? sum + g * plan.R * ld : nullptr,
                           first,
                           m.keep,
                           call.sq_norms ? &plain : nullptr,
                           &deviation};
      gemm<T>(plan.R, plan.Og, plan.T, {xg, plan.tap, plan.pos}, m.gyt + g * plan.T * ld, ld, norms);
      if (call.dgy) {
        this->forward(plan.T, xg, plan.pos, m.keep, m.dgyt, T(2));
        this->write_dgy(b, g, m.dgyt, T(1));
      }
      if (call.dx) {
        this->transpose_weights(m.keep, m.keep_t);
        for (int64_t i = 0; i < plan.n_phases; ++i) {
          const Phase& phase = plan.phases[i];
          this->backward(phase, phase.pixels, gy + g * this->gy_group(), phase.rows, phase.out, m.keep_t, m.dxt, T(2));
        }
        this->write_dx(b, g, m.dxt, T(1));
      }
    }
    if (call.sq_norms) static_cast<T*>(call.sq_norms)[b] = static_cast<T>(plain.value());
    if (call.deviation) static_cast<T*>(call.deviation)[b] = static_cast<T>(deviation.value());
  }
};

}  // namespace bootgrad::BOOTGRAD_ISA

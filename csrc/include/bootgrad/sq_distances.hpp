// Squared distances of pairs of tensors, ‖scale·a_k − b_k‖², in double: what a step reports of its mean gradient, for
// all parameters in one region. Short runs are added up in the compute type and blocks in their order, so that a result
// does not depend on the number of threads.

namespace bootgrad::BOOTGRAD_ISA {

template <class In>
struct SqDistances {
  using T = Compute<In>;
  const SqDistancesCall& call;

  void run() const {
    const int64_t blocks = call.first_block[call.tensors];
    double* partial =
        static_cast<double*>(call.runtime->scratch(kSharedScratch, static_cast<size_t>(blocks) * sizeof(double)));
    share(
        *call.runtime, blocks, [](Carver&) { return 0; }, [](int) {},
        [&](int64_t block, int) {
          int64_t k = 0;
          while (call.first_block[k + 1] <= block) ++k;
          const int64_t begin = (block - call.first_block[k]) * kDistanceBlock, left = call.sizes[k] - begin;
          const In* a = static_cast<const In*>(call.a[k]) + begin;
          const In* b = call.b ? static_cast<const In*>(call.b[k]) + begin : nullptr;
          partial[block] = of_block(a, b, left < kDistanceBlock ? left : kDistanceBlock);
        });
    for (int64_t k = 0; k < call.tensors; ++k) {
      double total = 0;
      for (int64_t block = call.first_block[k]; block < call.first_block[k + 1]; ++block) total += partial[block];
      call.out[k] = total;
    }
  }

 private:
  double of_block(const In* a, const In* b, int64_t count) const {
    constexpr int64_t n = kLanes<T>;
    const T scale = static_cast<T>(call.scale);
    double total = 0;
    int64_t i = 0;
    while (i + n <= count) {
      Vector<T> run{};
      for (const int64_t end = count - i < 16 * n ? count / n * n : i + 16 * n; i < end; i += n) {
        const Vector<T> apart = b ? load_wide(a + i) * scale - load_wide(b + i) : load_wide(a + i) * scale;
        run += apart * apart;
      }
      for (int64_t j = 0; j < n; ++j) total += static_cast<double>(run[j]);
    }
    for (; i < count; ++i) {
      const double apart = static_cast<double>(widen(a[i]) * scale - (b ? widen(b[i]) : T(0)));
      total += apart * apart;
    }
    return total;
  }
};

inline void sq_distances(const SqDistancesCall& call) {
  switch (call.dtype) {
    case DType::f32: return SqDistances<float>{call}.run();
    case DType::f64: return SqDistances<double>{call}.run();
    case DType::bf16: return SqDistances<bf16>{call}.run();
    case DType::f16: return SqDistances<f16>{call}.run();
  }
}

}  // namespace bootgrad::BOOTGRAD_ISA

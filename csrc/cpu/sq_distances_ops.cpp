// sq_distances of bootgrad/ops/schema.py on the CPU.

#include "host.h"
#include "kernels.h"

namespace bootgrad {

namespace {

Tensor sq_distances(std::vector<Tensor> a, std::vector<Tensor> b, double scale) {
  require(!a.empty(), "sq_distances needs at least one tensor");
  require(b.empty() || b.size() == a.size(), "a and b must have as many tensors; got ", a.size(), " and ", b.size());
  check_dtype("a", a[0]);
  Sizes sizes, first_block{0};
  for (size_t k = 0; k < a.size(); ++k) {
    for (std::vector<Tensor>* list : {&a, &b}) {
      if (list->empty()) continue;
      Tensor& t = (*list)[k];
      require(sizes_of(t) == sizes_of(a[k]) && t.scalar_type() == a[0].scalar_type(),
              "a and b must have one dtype, and their tensors shapes in pairs; got ", shown(sizes_of(a[k])), " and ",
              shown(sizes_of(t)));
      t = packed(t);
    }
    sizes.push_back(a[k].numel());
    first_block.push_back(first_block.back() + (sizes.back() + kDistanceBlock - 1) / kDistanceBlock);
  }
  std::vector<const void*> of_a, of_b;
  for (const Tensor& t : a) of_a.push_back(pointer(t));
  for (const Tensor& t : b) of_b.push_back(pointer(t));
  Tensor out = allocate(a[0], {static_cast<int64_t>(a.size())}, ScalarType::Double);
  kernels().sq_distances({&runtime(), dtype_of(a[0]), static_cast<int64_t>(a.size()), of_a.data(),
                          of_b.empty() ? nullptr : of_b.data(), sizes.data(), first_block.data(), scale,
                          static_cast<double*>(result(out))});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bootgrad, CPU, m) { m.impl("sq_distances", TORCH_BOX(&sq_distances)); }

}  // namespace bootgrad

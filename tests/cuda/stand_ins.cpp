// The symbols of libtorch_cuda that our library needs, so that it loads where torch has no CUDA. None of them is ever
// called.

#include <cstdint>
#include <cstdlib>

extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { abort(); }
int32_t torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**) { abort(); }
void torch_c10_cuda_free_error_msg(char*) { abort(); }
}

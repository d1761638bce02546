// A stand-in for GNU's OpenMP whose threads ThreadSanitizer sees: each parallel region starts its threads and joins
// them. Torch's at::parallel_for needs no more than a region, a thread's number and the size of its team.

#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

struct Team {
  unsigned size = 1;
  pthread_barrier_t barrier;
};

thread_local Team* team = nullptr;
thread_local unsigned number = 0;

unsigned wanted() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  const int parsed = text ? std::atoi(text) : 1;
  return parsed > 0 ? static_cast<unsigned>(parsed) : 1;
}

unsigned& most() {
  static unsigned value = wanted();
  return value;
}

[[noreturn]] void unexpected(const char* name) {
  std::fprintf(stderr, "%s is not among what threads.cpp stands in for\n", name);
  std::abort();
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  Team* const outer = team;
  const unsigned outer_number = number;
  Team own;
  own.size = outer ? 1 : threads ? threads : most();
  pthread_barrier_init(&own.barrier, nullptr, own.size);
  const auto run = [&](unsigned k) {
    team = &own;
    number = k;
    work(data);
  };
  std::vector<std::thread> others;
  for (unsigned k = 1; k < own.size; ++k) others.emplace_back(run, k);
  run(0);
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&own.barrier);
  team = outer;
  number = outer_number;
}

void GOMP_barrier() {
  if (team) pthread_barrier_wait(&team->barrier);
}

int omp_get_thread_num() { return static_cast<int>(number); }
int omp_get_num_threads() { return team ? static_cast<int>(team->size) : 1; }
int omp_get_max_threads() { return team ? 1 : static_cast<int>(most()); }
int omp_in_parallel() { return team && team->size > 1; }
void omp_set_num_threads(int threads) { most() = threads > 0 ? static_cast<unsigned>(threads) : 1; }

bool GOMP_single_start() { return number == 0; }
bool GOMP_loop_dynamic_start(long, long, long, long, long*, long*) { unexpected("GOMP_loop_dynamic_start"); }
bool GOMP_loop_ordered_dynamic_start(long, long, long, long, long*, long*) {
  unexpected("GOMP_loop_ordered_dynamic_start");
}
unsigned GOMP_sections_start(unsigned) { unexpected("GOMP_sections_start"); }

}  // extern "C"

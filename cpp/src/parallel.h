// Threads of the CPU kernels: lemo's loops own the parallelism, BLAS runs one thread for each call.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

namespace lemo::cpu {

inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

/// body(i, thread) for i in [0, n), in any order on any thread; `thread` < max_threads().
/// An exception of a body is rethrown on the caller's thread after the loop.
template <typename Body>
void parallel_for(int64_t n, Body&& body) {
    std::exception_ptr error;
#pragma omp parallel num_threads(max_threads()) if (n > 1)
    {
        const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; ++i) {
            try {
                body(i, thread);
            } catch (...) {
#pragma omp critical(lemo_parallel_for_error)
                error = std::current_exception();
            }
        }
    }
    if (error) std::rethrow_exception(error);
}

/// body(first, end) over ranges of at least `grain` items that cover [0, n); static split.
template <typename Body>
void parallel_ranges(int64_t n, int64_t grain, Body&& body) {
    const int64_t ranges = std::min<int64_t>(max_threads(), (n + grain - 1) / grain);
    if (ranges <= 1) {
        if (n > 0) body(int64_t{0}, n);
        return;
    }
    parallel_for(ranges, [&](int64_t r, int) { body(n * r / ranges, n * (r + 1) / ranges); });
}

}  // namespace lemo::cpu

// Times of CUDA work for Google Benchmark, by CUDA events.
#pragma once

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include "device_views.h"

namespace lemo::bench {

/// Launches that are timed together, so that the GPU never waits for the host.
inline constexpr int kLaunches = 10;
inline constexpr int kWarmup = 3;

class Event {
public:
    Event() { testing::require(cudaEventCreate(&event_), "cudaEventCreate"); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event() { cudaEventDestroy(event_); }

    void record(cudaStream_t stream) const {
        testing::require(cudaEventRecord(event_, stream), "cudaEventRecord");
    }

    /// Waits for this event; seconds since `start`.
    double seconds_since(const Event& start) const {
        testing::require(cudaEventSynchronize(event_), "cudaEventSynchronize");
        float milliseconds = 0;
        testing::require(cudaEventElapsedTime(&milliseconds, start.event_, event_),
                         "cudaEventElapsedTime");
        return milliseconds * 1e-3;
    }

private:
    cudaEvent_t event_ = nullptr;
};

/// Times `launch(stream)`; register the benchmark with `->UseManualTime()`.
template <typename Launch>
void measure(benchmark::State& state, Launch&& launch) {
    cudaStream_t stream = nullptr;
    testing::require(cudaStreamCreate(&stream), "cudaStreamCreate");
    for (int i = 0; i < kWarmup; ++i) launch(stream);
    testing::synchronize();  // also the uploads on the default stream
    const Event start, end;
    while (state.KeepRunningBatch(kLaunches)) {
        start.record(stream);
        for (int i = 0; i < kLaunches; ++i) launch(stream);
        end.record(stream);
        state.SetIterationTime(end.seconds_since(start));
    }
    testing::synchronize();
    cudaStreamDestroy(stream);
}

}  // namespace lemo::bench

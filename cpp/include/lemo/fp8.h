// Numbers of 8 bits: e4m3 of "FP8 formats for deep learning" (arXiv 2209.05433), a scale for each
// row.
#pragma once

namespace lemo {

/// The largest number of e4m3, which the largest magnitude of a row becomes.
inline constexpr float kFp8Largest = 448.0f;

/// Magnitudes are taken for this one at least, so that scales and their inverses are normal
/// numbers of fp32. A row of zeros stays one.
inline constexpr float kFp8LeastMagnitude = 0x1p-110f;

}  // namespace lemo

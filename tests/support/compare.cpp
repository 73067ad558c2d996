#include "support/compare.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/error.h"

namespace mamba_native::test {
namespace {

struct Bound {
  const char* op;
  DType dtype;
  double nmse;
};

#define BOUND(op, dtype, nmse) {#op, DType::dtype, nmse},
constexpr Bound kBounds[] = {
#include "support/bounds.inc"
};
#undef BOUND

double max_error(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double error = std::fabs(a[i] - b[i]);
    if (!(error <= largest)) {  // lets NaN through
      largest = error;
    }
  }
  return largest;
}

double ulp(DType dtype, double magnitude) {
  const int precision = dtype == DType::f64   ? 52
                        : dtype == DType::f32 ? 23
                        : dtype == DType::f16 ? 10
                                              : 7;
  const int smallest_exponent = dtype == DType::f64 ? -1022 : dtype == DType::f16 ? -14 : -126;
  const int exponent = magnitude > 0 ? std::ilogb(magnitude) : smallest_exponent;
  return std::ldexp(1.0, std::max(exponent, smallest_exponent) - precision);
}

}  // namespace

double nmse_bound(const std::string& op, DType dtype) {
  for (const Bound& bound : kBounds) {
    if (op == bound.op && dtype == bound.dtype) {
      return bound.nmse;
    }
  }
  fail("bounds.inc has no row for ", op, " in ", name(dtype));
}

double nmse(const std::vector<double>& out, const std::vector<double>& truth) {
  double error = 0;
  double power = 0;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    error += (out[i] - truth[i]) * (out[i] - truth[i]);
    power += truth[i] * truth[i];
  }
  return error == 0 ? 0 : error / power;
}

testing::AssertionResult is_close(const std::string& op, DType dtype, const std::string& output,
                                  DType out_dtype, const std::vector<double>& out,
                                  const std::vector<double>& truth,
                                  const std::vector<double>& yardstick, double slack) {
  if (out.size() != truth.size() || yardstick.size() != truth.size()) {
    return testing::AssertionFailure()
           << op << " " << output << ": " << out.size() << " values, " << truth.size()
           << " expected, " << yardstick.size() << " in the yardstick";
  }
  double largest = 0;
  for (const double value : truth) {
    largest = std::max(largest, std::fabs(value));
  }
  const double error = nmse(out, truth);
  const double error_bound = nmse_bound(op, dtype);
  const double worst = max_error(out, truth);
  const double last = ulp(out_dtype, largest);
  const double worst_bound = slack * std::max(max_error(yardstick, truth), last / 2) + last;
  const bool close = error <= error_bound && worst <= worst_bound;
  char line[256];
  std::snprintf(line, sizeof line,
                "%s %s %s: nmse %.1e (%.0f %% of bound), max error %.1e (%.0f %%)", op.c_str(),
                name(dtype), output.c_str(), error, 100 * error / error_bound, worst,
                worst_bound > 0 ? 100 * worst / worst_bound : 0.0);
  testing::Test::RecordProperty(op + "_" + output, line);
  return (close ? testing::AssertionSuccess() : testing::AssertionFailure()) << line;
}

}  // namespace mamba_native::test

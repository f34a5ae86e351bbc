// Pools, transforms and gates one map of 64 channels and 28 x 28 pixels, and prints it before and after, pixel by
// pixel.
#include <steam/steam.h>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  const steam_problem unit = steam_usual_problem(1, 64, 28, 28);
  std::vector<float> x(64 * 28 * 28), y(x.size()), channel_weight(4 * 8), spatial_weight(4 * 8);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.37f * i) + 0.5f;
  for (std::size_t i = 0; i < 32; ++i) channel_weight[i] = std::cos(1.3f * i), spatial_weight[i] = std::cos(0.7f * i);
  steam_forward_args call{unit, channel_weight.data(), spatial_weight.data(), x.data(), nullptr, y.data(), nullptr};
  char message[STEAM_MESSAGE_BYTES];
  if (steam_cpu_forward(&call, nullptr, message) != STEAM_OK) return std::fprintf(stderr, "%s\n", message), 1;
  for (std::size_t i = 0; i < x.size(); ++i) std::printf("%.9g %.9g\n", x[i], y[i]);
}

// Parts of blocks: whole blocks were read into memory of the package's own, and of each some bytes were wanted.
#include <cstdint>

namespace gpunvme {

// Bytes that are copied from one address to another; the host writes the table.
struct Cut {
  std::uint64_t from;
  std::uint64_t to;
  std::uint64_t nbytes;
};

}  // namespace gpunvme

// One warp a cut, in turn. Neither addresses nor sizes are aligned to anything.
extern "C" __global__ void __launch_bounds__(128) gpunvme_cut(const gpunvme::Cut* cuts, unsigned long long count) {
  const unsigned long long warps = static_cast<unsigned long long>(gridDim.x) * blockDim.x / 32;
  const unsigned lane = threadIdx.x % 32;
  for (unsigned long long i = (blockIdx.x * blockDim.x + threadIdx.x) / 32; i < count; i += warps) {
    const gpunvme::Cut cut = cuts[i];
    const auto* const from = reinterpret_cast<const unsigned char*>(cut.from);
    auto* const to = reinterpret_cast<unsigned char*>(cut.to);
    for (std::uint64_t at = lane; at < cut.nbytes; at += 32) to[at] = from[at];
  }
}

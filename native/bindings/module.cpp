// gpunvme._native: the engine's classes as Python sees them. What they mean is said where the engine declares them;
// what they look like from Python, in src/gpunvme/_native.pyi.
#include <nanobind/nanobind.h>

#include "bindings.h"

NB_MODULE(_native, module) {
  module.doc() = "The engine of gpunvme. Not a public interface: use gpunvme.";
  gpunvme::bind_files(module);
  gpunvme::bind_catalog(module);
  gpunvme::bind_hand_over(module);
  gpunvme::bind_jobs(module);
  gpunvme::bind_memory(module);
  gpunvme::bind_nvme(module);
  gpunvme::bind_nvme_layout(module);
  gpunvme::bind_soft(module);
  gpunvme::bind_baselines(module);
}

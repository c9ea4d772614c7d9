// The driver's queues and transfers.
#include <nanobind/nanobind.h>

#include "bindings.h"

namespace gpunvme {

void bind_nvme(nanobind::module_&) {}

}  // namespace gpunvme

// The software controller.
#include <nanobind/nanobind.h>

#include "bindings.h"

namespace gpunvme {

void bind_soft(nanobind::module_&) {}

}  // namespace gpunvme

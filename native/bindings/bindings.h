#pragma once

#include <nanobind/nanobind.h>

namespace gpunvme {

void bind_baselines(nanobind::module_& module);
void bind_catalog(nanobind::module_& module);
void bind_files(nanobind::module_& module);
void bind_hand_over(nanobind::module_& module);
void bind_jobs(nanobind::module_& module);
void bind_memory(nanobind::module_& module);
void bind_nvme(nanobind::module_& module);
void bind_nvme_layout(nanobind::module_& module);
void bind_soft(nanobind::module_& module);

}  // namespace gpunvme

// What the NVMe specifications fix: registers, queue entries, opcodes, status codes.
//
// Names and offsets are those of the NVM Express Base Specification 2.0 and the NVM Command Set Specification 1.0;
// src/gpunvme/nvme/spec.py says the same in Python, and a test compares the two. Everything is little-endian, as are
// all machines that this builds for. Usable from CUDA device code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpunvme::nvme {

// Submission queue entry (Base 2.0, figure 86), with PRPs as data pointer.
struct Sqe {
  std::uint8_t opcode;
  std::uint8_t flags;  // bits 1:0 FUSE, 7:6 PSDT
  std::uint16_t cid;
  std::uint32_t nsid;
  std::uint32_t cdw2;
  std::uint32_t cdw3;
  std::uint64_t mptr;
  std::uint64_t prp1;
  std::uint64_t prp2;
  std::uint32_t cdw10;
  std::uint32_t cdw11;
  std::uint32_t cdw12;
  std::uint32_t cdw13;
  std::uint32_t cdw14;
  std::uint32_t cdw15;
};
static_assert(sizeof(Sqe) == 64 && offsetof(Sqe, prp1) == 24 && offsetof(Sqe, cdw10) == 40);

// Completion queue entry (Base 2.0, figure 89).
struct Cqe {
  std::uint32_t dw0;  // command specific result
  std::uint32_t dw1;
  std::uint16_t sq_head;
  std::uint16_t sq_id;
  std::uint16_t cid;
  std::uint16_t status;  // bit 0 phase tag, 15:1 status field (SC 8:1, SCT 11:9, CRD 13:12, M 14, DNR 15)
};
static_assert(sizeof(Cqe) == 16 && offsetof(Cqe, sq_head) == 8 && offsetof(Cqe, status) == 14);

}  // namespace gpunvme::nvme

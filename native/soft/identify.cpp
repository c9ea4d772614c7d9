#include "identify.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

namespace gpunvme::soft {
namespace {

using Page = std::array<std::byte, nvme::kIdentifyBytes>;

constexpr std::uint16_t refuse(std::uint16_t code) { return code | nvme::kStatusDnr; }

template <typename Structure>
void put(Page& page, const Structure& structure, std::size_t offset = 0) {
  std::memcpy(page.data() + offset, &structure, sizeof structure);
}

// Bytes that differ between controllers, namespaces and uses, and are the same each time: FNV-1a, twice.
std::array<std::uint8_t, 16> fingerprint(const Device& device, std::uint32_t nsid, char use) {
  const std::string text = device.serial + '/' + std::to_string(nsid) + '/' + use;
  std::array<std::uint8_t, 16> bytes{};
  for (std::uint64_t half = 0; half < 2; ++half) {
    std::uint64_t hash = 0xCBF29CE484222325u + half;
    for (const char c : text) hash = (hash ^ static_cast<std::uint8_t>(c)) * 0x100000001B3u;
    hash ^= hash >> 29;
    std::memcpy(bytes.data() + 8 * half, &hash, 8);
  }
  return bytes;
}

// A random UUID in form (RFC 4122, version 4).
std::array<std::uint8_t, 16> uuid(const Device& device, std::uint32_t nsid) {
  auto bytes = fingerprint(device, nsid, 'u');
  bytes[6] = static_cast<std::uint8_t>((bytes[6] & 0x0F) | 0x40);
  bytes[8] = static_cast<std::uint8_t>((bytes[8] & 0x3F) | 0x80);
  return bytes;
}

// Locally administered, as an OUI that nobody was given has to be (IEEE 802, bit 1 of the first byte).
template <std::size_t n>
std::array<std::uint8_t, n> local_id(const Device& device, std::uint32_t nsid, char use) {
  const auto bytes = fingerprint(device, nsid, use);
  std::array<std::uint8_t, n> id{};
  std::copy_n(bytes.begin(), n, id.begin());
  id[0] = static_cast<std::uint8_t>((id[0] & 0xFC) | 0x02);
  return id;
}
auto eui64(const Device& device, std::uint32_t nsid) { return local_id<8>(device, nsid, 'e'); }
auto nguid(const Device& device, std::uint32_t nsid) { return local_id<16>(device, nsid, 'g'); }

void controller(const Device& device, Page& page) {
  nvme::IdentifyController data{};
  const Options& options = device.options;
  data.vid = data.ssvid = kPciVendor;
  put_text(data.sn, sizeof data.sn, device.serial.c_str());
  put_text(data.mn, sizeof data.mn, kModel);
  put_text(data.fr, sizeof data.fr, kFirmware);
  data.rab = 4;  // batches of 16 commands
  data.mdts = static_cast<std::uint8_t>(options.mdts);
  data.cntlid = kControllerId;
  data.ver = nvme::kVersion20;
  data.cntrltype = 1;  // I/O controller
  data.acl = 3;
  data.aerl = Events::kRequestsMost - 1;
  data.frmw = 1 << 1 | 1;      // one slot, read-only
  data.lpa = 1 << 1 | 1 << 2;  // commands supported and effects; offsets into log pages
  data.elpe = Events::kErrorsKept - 1;
  data.wctemp = kWarningTemperature;
  data.cctemp = kCriticalTemperature;
  const std::uint64_t capacity = device.backend->size();
  std::memcpy(data.tnvmcap, &capacity, sizeof capacity);
  data.sqes = nvme::kSqeExponent << 4 | nvme::kSqeExponent;
  data.cqes = nvme::kCqeExponent << 4 | nvme::kCqeExponent;
  data.nn = static_cast<std::uint32_t>(device.namespaces.size());
  data.oncs = nvme::kOncsCompare | nvme::kOncsDatasetManagement | nvme::kOncsWriteZeroes | nvme::kOncsSaveSelect |
              nvme::kOncsVerify;
  // Whether or not there is a cache, Flush may name all namespaces at once (bits 2:1).
  data.vwc = static_cast<std::uint8_t>(3 << 1 | (options.vwc ? 1 : 0));
  const auto id = uuid(device, 0);
  char* to = data.subnqn + std::snprintf(data.subnqn, sizeof data.subnqn, "nqn.2014-08.org.nvmexpress:uuid:");
  for (std::size_t i = 0; i < id.size(); ++i) {
    to += std::sprintf(to, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", id[i]);
  }
  data.psd[0].mp = 2500;  // 25 W
  put(page, data);
}

void describe_namespace(const Device& device, std::uint32_t nsid, Page& page) {
  nvme::IdentifyNamespace data{};
  const Namespace& space = device.namespaces[nsid - 1];
  data.nsze = data.ncap = data.nuse = space.blocks;
  data.dlfeat = 1 | 1 << 3;  // deallocated blocks read as zeroes; Write Zeroes may deallocate
  const std::uint64_t capacity = space.blocks << device.lba_shift;
  std::memcpy(data.nvmcap, &capacity, sizeof capacity);
  data.nsattr = device.backend->read_only() ? 1 : 0;
  std::ranges::copy(nguid(device, nsid), data.nguid);
  std::ranges::copy(eui64(device, nsid), data.eui64);
  data.lbaf[0].lbads = static_cast<std::uint8_t>(device.lba_shift);
  put(page, data);
}

template <std::size_t n>
void add_descriptor(Page& page, std::size_t& offset, std::uint8_t type, const std::array<std::uint8_t, n>& value) {
  nvme::NamespaceDescriptor descriptor{};
  descriptor.nidt = type;
  descriptor.nidl = n;
  put(page, descriptor, offset);
  put(page, value, offset + sizeof descriptor);
  offset += sizeof descriptor + n;
}

void descriptors(const Device& device, std::uint32_t nsid, Page& page) {
  std::size_t offset = 0;
  add_descriptor(page, offset, nvme::kNidtEui64, eui64(device, nsid));
  add_descriptor(page, offset, nvme::kNidtNguid, nguid(device, nsid));
  add_descriptor(page, offset, nvme::kNidtUuid, uuid(device, nsid));
  add_descriptor(page, offset, nvme::kNidtCsi, std::array<std::uint8_t, 1>{nvme::kCsiNvm});
}

// Namespaces above `after`, in order; the list ends with a 0, or is full.
std::uint16_t list_namespaces(const Device& device, std::uint32_t after, Page& page) {
  if (after >= 0xFFFFFFFE) return refuse(nvme::kStatusInvalidNamespaceOrFormat);
  std::size_t entries = 0;
  for (std::uint32_t nsid = after + 1; nsid <= device.namespaces.size(); ++nsid) {
    if (entries == nvme::kNamespaceListEntries) break;
    put(page, nsid, entries++ * 4);
  }
  return nvme::kStatusSuccess;
}

// The one controller there is, if it is not below the one asked for.
void list_controllers(std::uint16_t from, Page& page) {
  if (from > kControllerId) return;
  put(page, std::uint16_t{1});
  put(page, kControllerId, 2);
}

// Independent of the command set (Base 2.0, 5.17.2.8): all that is not zero of it.
void independent(const Device& device, Page& page) {
  page[8] = static_cast<std::byte>(device.backend->read_only() ? 1 : 0);  // NSATTR
  page[14] = std::byte{1};                                                // NSTAT: ready
}

}  // namespace

void put_text(char* field, std::size_t nbytes, const char* text) {
  const std::size_t length = std::min(nbytes, std::strlen(text));
  std::memset(field, ' ', nbytes);
  std::memcpy(field, text, length);
}

std::uint16_t identify(const Device& device, const nvme::Sqe& sqe, Page& page) {
  const std::uint8_t cns = sqe.cdw10 & 0xFF;
  const std::uint8_t csi = sqe.cdw11 >> 24;
  const bool exists = device.find(sqe.nsid) != nullptr;
  switch (cns) {
    case nvme::kCnsNamespace:
    case nvme::kCnsAllocatedNamespace:
      if (!exists) return refuse(nvme::kStatusInvalidNamespaceOrFormat);
      describe_namespace(device, sqe.nsid, page);
      return nvme::kStatusSuccess;
    case nvme::kCnsController:
      controller(device, page);
      return nvme::kStatusSuccess;
    case nvme::kCnsActiveNamespaces:
    case nvme::kCnsAllocatedNamespaces:
      return list_namespaces(device, sqe.nsid, page);
    case nvme::kCnsNamespaceDescriptors:
      if (!exists) return refuse(nvme::kStatusInvalidNamespaceOrFormat);
      descriptors(device, sqe.nsid, page);
      return nvme::kStatusSuccess;
    case nvme::kCnsCommandSetNamespace:
      if (csi != nvme::kCsiNvm) return refuse(nvme::kStatusInvalidField);
      // No protection information and no storage tags: all zeroes (NVM Command Set 1.0, 4.1.5.3).
      return exists ? nvme::kStatusSuccess : refuse(nvme::kStatusInvalidNamespaceOrFormat);
    case nvme::kCnsCommandSetController:
      // No limits of Verify's, Write Zeroes' and Dataset Management's own: all zeroes (4.1.5.4).
      return csi == nvme::kCsiNvm ? nvme::kStatusSuccess : refuse(nvme::kStatusInvalidField);
    case nvme::kCnsCommandSetActiveNamespaces:
      if (csi != nvme::kCsiNvm) return refuse(nvme::kStatusInvalidField);
      return list_namespaces(device, sqe.nsid, page);
    case nvme::kCnsIndependentNamespace:
      if (!exists) return refuse(nvme::kStatusInvalidNamespaceOrFormat);
      independent(device, page);
      return nvme::kStatusSuccess;
    case nvme::kCnsAttachedControllers:
      if (!exists) return refuse(nvme::kStatusInvalidNamespaceOrFormat);
      list_controllers(static_cast<std::uint16_t>(sqe.cdw10 >> 16), page);
      return nvme::kStatusSuccess;
    case nvme::kCnsControllers:
      list_controllers(static_cast<std::uint16_t>(sqe.cdw10 >> 16), page);
      return nvme::kStatusSuccess;
    case nvme::kCnsCommandSets:
      page[0] = std::byte{1};  // combination 0: the NVM command set
      return nvme::kStatusSuccess;
    default:
      return refuse(nvme::kStatusInvalidField);
  }
}

}  // namespace gpunvme::soft

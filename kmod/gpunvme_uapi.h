/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/gpunvmeN: one NVMe function for one process, with user memory and dma-bufs mapped for it.
 *
 * Every structure begins with its size, as the caller knows it; what the caller does not know of reads as zero, and a
 * larger structure than the module knows is refused unless the rest is zero (E2BIG).
 */
#ifndef GPUNVME_UAPI_H
#define GPUNVME_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define GPUNVME_UAPI_VERSION 1

/* Bus addresses are told for each unit of this many bytes. */
#define GPUNVME_UNIT 4096

/**
 * struct gpunvme_info - what there is
 * @size: of this structure
 * @version: GPUNVME_UAPI_VERSION of the module
 * @bar_nbytes: size of BAR0
 * @mmap_nbytes: how much of it mmap() gives, from its start: as far as the MSI-X table, where that lies in BAR0
 * @vectors: interrupt vectors that can be set
 * @flags: GPUNVME_INFO_*
 * @max_mappings: mappings that one opener may have at a time
 * @reserved: zero
 */
struct gpunvme_info {
	__u32 size;
	__u32 version;
	__u64 bar_nbytes;
	__u64 mmap_nbytes;
	__u32 vectors;
	__u32 flags;
	__u32 max_mappings;
	__u32 reserved;
};

/* An IOMMU keeps the function to what is mapped; without one, opening takes CAP_SYS_RAWIO. */
#define GPUNVME_INFO_IOMMU 0x1
/* The module can attach dma-bufs. */
#define GPUNVME_INFO_DMABUF 0x2

/**
 * struct gpunvme_map - memory for the function
 * @size: of this structure
 * @flags: GPUNVME_MAP_*
 * @address: user memory: where it begins; dma-buf: offset in it. A multiple of the unit
 * @nbytes: how much; a multiple of the unit
 * @addresses: pointer to room for nbytes / unit bus addresses, 64 bits each; written
 * @fd: of a dma-buf, or -1 for user memory
 * @handle: what GPUNVME_UNMAP wants; written
 */
struct gpunvme_map {
	__u32 size;
	__u32 flags;
	__u64 address;
	__u64 nbytes;
	__u64 addresses;
	__s32 fd;
	__u32 handle;
};

/* The function may write there, too. */
#define GPUNVME_MAP_WRITE 0x1

/**
 * struct gpunvme_unmap - memory that the function does not use any more
 * @size: of this structure
 * @handle: from GPUNVME_MAP
 */
struct gpunvme_unmap {
	__u32 size;
	__u32 handle;
};

/**
 * struct gpunvme_vector - where an interrupt goes
 * @size: of this structure
 * @vector: its number
 * @fd: an eventfd, or -1: nowhere
 * @reserved: zero
 */
struct gpunvme_vector {
	__u32 size;
	__u32 vector;
	__s32 fd;
	__u32 reserved;
};

#define GPUNVME_IOC 0xB7
#define GPUNVME_INFO _IOWR(GPUNVME_IOC, 0, struct gpunvme_info)
#define GPUNVME_MAP _IOWR(GPUNVME_IOC, 1, struct gpunvme_map)
#define GPUNVME_UNMAP _IOW(GPUNVME_IOC, 2, struct gpunvme_unmap)
#define GPUNVME_VECTOR _IOW(GPUNVME_IOC, 3, struct gpunvme_vector)
/* Disables the controller, and resets the function if it can be. No mapping is lost. */
#define GPUNVME_RESET _IO(GPUNVME_IOC, 4)

#endif

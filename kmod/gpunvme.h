/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the parts of the module know of each other.
 *
 * One function has one opener at a time. A mapping lives in the opener's table and ends by GPUNVME_UNMAP, with the
 * last reference to the file, or with the function; in the last two cases not before the function was quiesced.
 */
#ifndef GPUNVME_H
#define GPUNVME_H

#include <linux/cdev.h>
#include <linux/dma-buf.h>
#include <linux/dma-resv.h>
#include <linux/eventfd.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/rwsem.h>
#include <linux/scatterlist.h>
#include <linux/version.h>
#include <linux/xarray.h>

#include "gpunvme_uapi.h"

/* PAGE_SIZE is a multiple of the unit on every machine; on x86-64 they are the same. */
#define GPUNVME_MOST_VECTORS 64

/**
 * struct gpunvme_counts - what has happened since the function was bound; in debugfs
 * @opened: how often it was opened
 * @mapped: mappings made
 * @unmapped: mappings ended
 * @refused: ioctls that ended in an error
 * @revoked: dma-bufs that their exporter took back
 * @quiesced: how often the controller was disabled by the module
 * @unwilling: of these, how often it did not become idle in its own time, CAP.TO
 * @interrupts: that were passed on
 * @pinned: bytes of user memory that are pinned now
 * @attached: bytes of dma-bufs that are mapped now
 */
struct gpunvme_counts {
	atomic64_t opened, mapped, unmapped, refused, revoked, quiesced, unwilling, interrupts;
	atomic64_t pinned, attached;
};

/**
 * struct gpunvme_vector_state - an interrupt vector of the opener
 * @lock: a handler may run while the eventfd is exchanged
 * @target: where it goes, or NULL
 * @irq: its Linux number, 0 if it was not requested
 * @counts: of the device
 * @name: in /proc/interrupts
 */
struct gpunvme_vector_state {
	spinlock_t lock; /* of @target */
	struct eventfd_ctx *target;
	int irq;
	struct gpunvme_counts *counts;
	char name[32];
};

/**
 * struct gpunvme - a function
 * @device: the character device; its release frees this structure
 * @cdev: in it
 * @pdev: the function
 * @bar: BAR0, mapped for the kernel
 * @bar_start: its bus address
 * @bar_nbytes: its size
 * @mmap_nbytes: see struct gpunvme_info
 * @number: N of gpunvmeN
 * @is_busy: somebody has it open
 * @gate: read: the function is being used by an ioctl; write: it is being taken away
 * @is_gone: the function was taken away; under @gate
 * @opener: who has it open, or NULL; changed under @gate, written
 * @vectors: how many interrupts were allocated
 * @vector: where each of them goes
 * @counts: for debugfs
 * @folder: in debugfs
 */
struct gpunvme {
	struct device device;
	struct cdev cdev;
	struct pci_dev *pdev;
	void __iomem *bar;
	resource_size_t bar_start;
	resource_size_t bar_nbytes;
	resource_size_t mmap_nbytes;
	int number;
	atomic_t is_busy;
	struct rw_semaphore gate;
	bool is_gone;
	struct gpunvme_opener *opener;
	int vectors;
	struct gpunvme_vector_state vector[GPUNVME_MOST_VECTORS];
	struct gpunvme_counts counts;
	struct dentry *folder;
};

/**
 * struct gpunvme_opener - who has a function open
 * @owner: the function
 * @mm: whose locked memory is counted
 * @lock: of the table, and of what is done to its mappings
 * @mappings: by handle
 * @count: of them
 * @inode_mapping: where BAR0 is mapped from, to take it away
 */
struct gpunvme_opener {
	struct gpunvme *owner;
	struct mm_struct *mm;
	struct mutex lock; /* of @mappings and @count */
	struct xarray mappings;
	unsigned int count;
	struct address_space *inode_mapping;
};

/**
 * struct gpunvme_mapping - memory that the function reaches
 * @owner: whose function
 * @mm: whose locked memory is counted, or NULL
 * @handle: its number
 * @address: as the caller gave it
 * @nbytes: its size
 * @direction: what the function may do
 * @pages: pinned, or NULL for a dma-buf
 * @count: of them
 * @table: with bus addresses
 * @own_table: where @table is the module's
 * @attachment: of the dma-buf, or NULL
 * @is_pinned: the exporter was asked not to move it
 * @is_revoked: the exporter took it back; under the dma-buf's reservation lock
 */
struct gpunvme_mapping {
	struct gpunvme *owner;
	struct mm_struct *mm;
	u32 handle;
	u64 address;
	u64 nbytes;
	enum dma_data_direction direction;
	struct page **pages;
	unsigned long count;
	struct sg_table *table;
	struct sg_table own_table;
	struct dma_buf_attachment *attachment;
	bool is_pinned;
	bool is_revoked;
};

extern bool gpunvme_debug;

#define gpunvme_say(owner, format, ...) \
	do { \
		if (gpunvme_debug) \
			pci_info((owner)->pdev, format, ##__VA_ARGS__); \
	} while (0)

/* controller.c */
void gpunvme_quiesce(struct gpunvme *owner);
int gpunvme_reset(struct gpunvme *owner);

/* file.c */
extern const struct file_operations gpunvme_file_operations;

/* mapping.c */
bool gpunvme_is_confined(struct gpunvme *owner);
void gpunvme_flush(struct gpunvme *owner);
struct gpunvme_mapping *gpunvme_map_user(struct gpunvme_opener *opener, u64 address, u64 nbytes,
					 enum dma_data_direction direction);
struct gpunvme_mapping *gpunvme_new_mapping(struct gpunvme_opener *opener, u64 address, u64 nbytes,
					    enum dma_data_direction direction);
int gpunvme_list_addresses(const struct gpunvme_mapping *mapping, u64 skip, u64 *to);
void gpunvme_unmap(struct gpunvme_mapping *mapping);
void gpunvme_unmap_all(struct gpunvme_opener *opener);

/* dmabuf.c */
struct gpunvme_mapping *gpunvme_map_dmabuf(struct gpunvme_opener *opener, int fd, u64 offset, u64 nbytes,
					   enum dma_data_direction direction);
int gpunvme_list_dmabuf(const struct gpunvme_mapping *mapping, u64 *to);
void gpunvme_unmap_dmabuf(struct gpunvme_mapping *mapping);

/* vectors.c */
int gpunvme_allocate_vectors(struct gpunvme *owner);
void gpunvme_free_vectors(struct gpunvme *owner);
int gpunvme_set_vector(struct gpunvme *owner, u32 number, int fd);
void gpunvme_clear_vectors(struct gpunvme *owner);

/* debugfs.c */
void gpunvme_debugfs_start(void);
void gpunvme_debugfs_end(void);
void gpunvme_debugfs_add(struct gpunvme *owner);
void gpunvme_debugfs_remove(struct gpunvme *owner);

#endif

// SPDX-License-Identifier: GPL-2.0
/*
 * User memory for the function: pinned for long, counted, and mapped by the DMA API, so that an IOMMU stays on.
 *
 * Documentation/core-api/pin_user_pages.rst, Documentation/core-api/dma-api.rst.
 */
#include <linux/dma-mapping.h>
#include <linux/iommu.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "gpunvme.h"

/* Pages that are pinned at once: so many pointers are one allocation of a page's size. */
#define PINNED_AT_ONCE 512

/**
 * gpunvme_new_mapping() - a mapping of nothing yet
 * @opener: whose
 * @address: as the caller gave it
 * @nbytes: its size
 * @direction: what the function may do
 *
 * Return: the mapping, or -ENOMEM. gpunvme_unmap() frees it.
 */
struct gpunvme_mapping *gpunvme_new_mapping(struct gpunvme_opener *opener, u64 address, u64 nbytes,
					    enum dma_data_direction direction)
{
	struct gpunvme_mapping *mapping = kzalloc(sizeof(*mapping), GFP_KERNEL_ACCOUNT);

	if (!mapping)
		return ERR_PTR(-ENOMEM);
	mapping->owner = opener->owner;
	mapping->address = address;
	mapping->nbytes = nbytes;
	mapping->direction = direction;
	return mapping;
}

static int pin_pages(struct gpunvme_mapping *mapping, unsigned long wanted)
{
	unsigned int flags = FOLL_LONGTERM | (mapping->direction == DMA_BIDIRECTIONAL ? FOLL_WRITE : 0);

	while (mapping->count < wanted) {
		unsigned long at = mapping->address + (mapping->count << PAGE_SHIFT);
		int some = min_t(unsigned long, wanted - mapping->count, PINNED_AT_ONCE);
		int got;

		if (fatal_signal_pending(current))
			return -EINTR;
		got = pin_user_pages_fast(at, some, flags, mapping->pages + mapping->count);
		if (got < 0)
			return got;
		if (!got)
			return -EFAULT;
		mapping->count += got;
		cond_resched();
	}
	return 0;
}

/**
 * gpunvme_is_confined() - whether an IOMMU keeps the function to what is mapped
 * @owner: the function
 *
 * Return: false without an IOMMU, and where it passes every address through (iommu=pt).
 */
bool gpunvme_is_confined(struct gpunvme *owner)
{
	struct iommu_domain *domain = iommu_get_domain_for_dev(&owner->pdev->dev);

	return domain && domain->type & __IOMMU_DOMAIN_PAGING;
}

/**
 * gpunvme_flush() - have the IOMMU forget what was unmapped
 * @owner: the function
 *
 * The DMA API may leave that for later; but whoever drives the function is not trusted to have stopped using it.
 */
void gpunvme_flush(struct gpunvme *owner)
{
	struct iommu_domain *domain = iommu_get_domain_for_dev(&owner->pdev->dev);

	if (domain && domain->type & __IOMMU_DOMAIN_PAGING)
		iommu_flush_iotlb_all(domain);
}

/* Without an IOMMU, bounce buffers would take the place of memory that is out of reach: the data would never arrive. */
static bool is_bounced(const struct gpunvme_mapping *mapping)
{
	struct scatterlist *each;
	int i;

	if (gpunvme_is_confined(mapping->owner))
		return false;
	for_each_sgtable_dma_sg(mapping->table, each, i) {
		if (i < mapping->table->orig_nents && mapping->table->nents == mapping->table->orig_nents &&
		    sg_dma_address(each) != sg_phys(each))
			return true;
	}
	return false;
}

/**
 * gpunvme_map_user() - pin memory of the calling process and map it for the function
 * @opener: who asks
 * @address: where it begins; whole pages
 * @nbytes: how much; whole pages
 * @direction: DMA_BIDIRECTIONAL, or DMA_TO_DEVICE if the function only reads
 *
 * Return: the mapping, or an error: -ENOMEM (RLIMIT_MEMLOCK, too), -EFAULT (not there, or read-only), -EOPNOTSUPP
 * (memory that cannot be pinned for long: a file's, a device's), -EIO (not within the function's reach).
 */
struct gpunvme_mapping *gpunvme_map_user(struct gpunvme_opener *opener, u64 address, u64 nbytes,
					 enum dma_data_direction direction)
{
	struct gpunvme_mapping *mapping = gpunvme_new_mapping(opener, address, nbytes, direction);
	unsigned long wanted = nbytes >> PAGE_SHIFT;
	int error;

	if (IS_ERR(mapping))
		return mapping;
	mapping->pages = kvcalloc(wanted, sizeof(*mapping->pages), GFP_KERNEL_ACCOUNT);
	if (!mapping->pages) {
		kfree(mapping);
		return ERR_PTR(-ENOMEM);
	}
	/* Of the process that opened the file, whoever has it now: it is the one who was given the device. */
	if (current->mm != opener->mm) {
		error = -EPERM;
		goto failed;
	}
	error = account_locked_vm(opener->mm, wanted, true);
	if (error)
		goto failed;
	mmgrab(opener->mm);
	mapping->mm = opener->mm;
	error = pin_pages(mapping, wanted);
	if (error)
		goto failed;
	error = sg_alloc_table_from_pages(&mapping->own_table, mapping->pages, wanted, 0, nbytes, GFP_KERNEL_ACCOUNT);
	if (error)
		goto failed;
	error = dma_map_sgtable(&opener->owner->pdev->dev, &mapping->own_table, direction, 0);
	if (error) {
		sg_free_table(&mapping->own_table);
		goto failed;
	}
	mapping->table = &mapping->own_table;
	atomic64_add(nbytes, &opener->owner->counts.pinned);
	if (is_bounced(mapping)) {
		error = -EIO;
		goto failed;
	}
	return mapping;
failed:
	gpunvme_unmap(mapping);
	return ERR_PTR(error);
}

/**
 * gpunvme_list_addresses() - where the function finds a mapping
 * @mapping: the mapping; a dma-buf's reservation lock is held
 * @skip: bytes of its table before what was asked for
 * @to: an address for each unit; written
 *
 * Return: 0, or -EINVAL if a segment does not lie on units, or there are too few.
 */
int gpunvme_list_addresses(const struct gpunvme_mapping *mapping, u64 skip, u64 *to)
{
	u64 left = mapping->nbytes;
	struct scatterlist *each;
	int i;

	for_each_sgtable_dma_sg(mapping->table, each, i) {
		u64 address = sg_dma_address(each);
		u64 nbytes = sg_dma_len(each);

		if (skip >= nbytes) {
			skip -= nbytes;
			continue;
		}
		address += skip;
		nbytes = min(nbytes - skip, left);
		skip = 0;
		if ((address | nbytes) & (GPUNVME_UNIT - 1))
			return -EINVAL;
		for (; nbytes; nbytes -= GPUNVME_UNIT, address += GPUNVME_UNIT, left -= GPUNVME_UNIT)
			*to++ = address;
		if (!left)
			return 0;
	}
	return -EINVAL;
}

/**
 * gpunvme_unmap() - take memory away from the function, and let go of it
 * @mapping: what is to end; nothing refers to it any more
 *
 * The caller knows that the function does not use it: it said so (GPUNVME_UNMAP), or the function was quiesced.
 */
void gpunvme_unmap(struct gpunvme_mapping *mapping)
{
	struct gpunvme *owner = mapping->owner;

	if (mapping->attachment) {
		gpunvme_unmap_dmabuf(mapping);
	} else {
		if (mapping->table) {
			dma_unmap_sgtable(&owner->pdev->dev, mapping->table, mapping->direction, 0);
			gpunvme_flush(owner);
			sg_free_table(mapping->table);
			atomic64_sub(mapping->nbytes, &owner->counts.pinned);
		}
		unpin_user_pages_dirty_lock(mapping->pages, mapping->count, mapping->direction == DMA_BIDIRECTIONAL);
		kvfree(mapping->pages);
		if (mapping->mm) {
			account_locked_vm(mapping->mm, mapping->nbytes >> PAGE_SHIFT, false);
			mmdrop(mapping->mm);
		}
	}
	kfree(mapping);
}

/**
 * gpunvme_unmap_all() - end all mappings of an opener
 * @opener: whose; the function was quiesced
 */
void gpunvme_unmap_all(struct gpunvme_opener *opener)
{
	struct gpunvme_mapping *mapping;
	unsigned long handle;

	mutex_lock(&opener->lock);
	xa_for_each(&opener->mappings, handle, mapping) {
		xa_erase(&opener->mappings, handle);
		atomic64_inc(&opener->owner->counts.unmapped);
		gpunvme_unmap(mapping);
	}
	opener->count = 0;
	mutex_unlock(&opener->lock);
}

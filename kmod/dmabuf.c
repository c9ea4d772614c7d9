// SPDX-License-Identifier: GPL-2.0
/*
 * Memory of other devices for the function: dma-bufs, which CUDA, amdgpu, nouveau, udmabuf and others export.
 *
 * Documentation/driver-api/dma-buf.rst: dynamic attachments. A controller in the middle of its work cannot be told that
 * memory moves. So the exporter is asked to pin it; if it takes it back all the same, the function loses bus mastering
 * before the exporter goes on.
 */
#include <linux/module.h>

#include "gpunvme.h"

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS("DMA_BUF");
#else
MODULE_IMPORT_NS(DMA_BUF);
#endif

static void unmap_locked(struct gpunvme_mapping *mapping)
{
	if (mapping->table) {
		dma_buf_unmap_attachment(mapping->attachment, mapping->table, mapping->direction);
		gpunvme_flush(mapping->owner);
		atomic64_sub(mapping->nbytes, &mapping->owner->counts.attached);
	}
	mapping->table = NULL;
}

/* The exporter holds the reservation lock. */
static void taken_back(struct dma_buf_attachment *attachment)
{
	struct gpunvme_mapping *mapping = attachment->importer_priv;

	if (!mapping->table)
		return;
	pci_warn(mapping->owner->pdev, "a dma-buf of %llu bytes was taken back; the controller is cut off\n",
		 mapping->nbytes);
	pci_clear_master(mapping->owner->pdev);
	pci_wait_for_pending_transaction(mapping->owner->pdev);
	atomic64_inc(&mapping->owner->counts.revoked);
	mapping->is_revoked = true;
	unmap_locked(mapping);
}

static const struct dma_buf_attach_ops attach_operations = {
	.allow_peer2peer = true,
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
	.invalidate_mappings = taken_back,
#else
	.move_notify = taken_back,
#endif
};

static int attach(struct gpunvme_mapping *mapping, struct dma_buf *buffer)
{
	struct dma_buf_attachment *attachment;
	struct sg_table *table;
	int error;

	attachment = dma_buf_dynamic_attach(buffer, &mapping->owner->pdev->dev, &attach_operations, mapping);
	if (IS_ERR(attachment))
		return PTR_ERR(attachment);
	mapping->attachment = attachment;
	dma_resv_lock(buffer->resv, NULL);
	error = dma_buf_pin(attachment);
	if (!error) {
		mapping->is_pinned = true;
		table = dma_buf_map_attachment(attachment, mapping->direction);
		if (IS_ERR(table)) {
			error = PTR_ERR(table);
		} else {
			mapping->table = table;
			atomic64_add(mapping->nbytes, &mapping->owner->counts.attached);
		}
	}
	dma_resv_unlock(buffer->resv);
	return error;
}

/**
 * gpunvme_map_dmabuf() - map a part of a dma-buf for the function
 * @opener: who asks
 * @fd: of the dma-buf
 * @offset: where the part begins in it
 * @nbytes: of the part
 * @direction: DMA_BIDIRECTIONAL, or DMA_TO_DEVICE if the function only reads
 *
 * Return: the mapping, or an error: -EBADF, -EINVAL (no dma-buf), -ERANGE (not inside of it), and whatever the exporter
 * says: it knows whether its memory can be reached from here.
 */
struct gpunvme_mapping *gpunvme_map_dmabuf(struct gpunvme_opener *opener, int fd, u64 offset, u64 nbytes,
					   enum dma_data_direction direction)
{
	struct dma_buf *buffer = dma_buf_get(fd);
	struct gpunvme_mapping *mapping;
	int error;

	if (IS_ERR(buffer))
		return ERR_CAST(buffer);
	if (offset > buffer->size || nbytes > buffer->size - offset) {
		dma_buf_put(buffer);
		return ERR_PTR(-ERANGE);
	}
	mapping = gpunvme_new_mapping(opener, offset, nbytes, direction);
	if (IS_ERR(mapping)) {
		dma_buf_put(buffer);
		return mapping;
	}
	error = attach(mapping, buffer);
	if (error) {
		if (mapping->attachment) {
			gpunvme_unmap(mapping);
		} else {
			dma_buf_put(buffer);
			kfree(mapping);
		}
		return ERR_PTR(error);
	}
	return mapping;
}

/**
 * gpunvme_list_dmabuf() - gpunvme_list_addresses() for a dma-buf, which its exporter may take back at any time
 * @mapping: the mapping
 * @to: an address for each unit; written
 *
 * Return: 0, -ESTALE if it was taken back, or -EINVAL.
 */
int gpunvme_list_dmabuf(const struct gpunvme_mapping *mapping, u64 *to)
{
	struct dma_resv *lock = mapping->attachment->dmabuf->resv;
	int error = -ESTALE;

	dma_resv_lock(lock, NULL);
	if (mapping->table)
		error = gpunvme_list_addresses(mapping, mapping->address, to);
	dma_resv_unlock(lock);
	return error;
}

/**
 * gpunvme_unmap_dmabuf() - the part of gpunvme_unmap() for a dma-buf
 * @mapping: the mapping
 */
void gpunvme_unmap_dmabuf(struct gpunvme_mapping *mapping)
{
	struct dma_buf *buffer = mapping->attachment->dmabuf;

	dma_resv_lock(buffer->resv, NULL);
	unmap_locked(mapping);
	if (mapping->is_pinned)
		dma_buf_unpin(mapping->attachment);
	dma_resv_unlock(buffer->resv);
	dma_buf_detach(buffer, mapping->attachment);
	dma_buf_put(buffer);
}

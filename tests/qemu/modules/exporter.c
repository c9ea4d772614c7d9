// SPDX-License-Identifier: GPL-2.0
/*
 * For tests: /dev/exporter hands out dma-bufs, as a GPU's driver does, and behaves as badly as one may: it takes memory
 * back, refuses to be attached, pinned or mapped, and says so of pieces that do not lie on pages.
 */
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS("DMA_BUF");
#else
MODULE_IMPORT_NS(DMA_BUF);
#endif
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
#define take_back dma_buf_invalidate_mappings
#else
#define take_back dma_buf_move_notify
#endif

#define MOST_PAGES 1024

/* What EXPORT is told, and tests/qemu/inside/exporter.py tells. */
enum {
	REFUSE_ATTACH = 1 << 0,
	REFUSE_PIN = 1 << 1,
	REFUSE_MAP = 1 << 2,
	MAP_ODD = 1 << 3, /* pieces that begin within pages */
	MAP_SHORT = 1 << 4, /* less than there is */
};

struct request {
	__u32 pages;
	__u32 flags;
};

#define EXPORT _IOW('x', 0, struct request)
#define TAKE_BACK _IO('x', 1)

struct memory {
	u32 flags;
	u32 count;
	struct page *pages[];
};

/* What there is now: all zero when nobody holds anything of ours. */
static atomic_t buffers, attachments, pins, mappings;

static int on_attach(struct dma_buf *buffer, struct dma_buf_attachment *attachment)
{
	struct memory *memory = buffer->priv;

	if (memory->flags & REFUSE_ATTACH)
		return -EPERM;
	atomic_inc(&attachments);
	return 0;
}

static void on_detach(struct dma_buf *buffer, struct dma_buf_attachment *attachment)
{
	atomic_dec(&attachments);
}

static int on_pin(struct dma_buf_attachment *attachment)
{
	struct memory *memory = attachment->dmabuf->priv;

	dma_resv_assert_held(attachment->dmabuf->resv);
	if (memory->flags & REFUSE_PIN)
		return -EBUSY;
	atomic_inc(&pins);
	return 0;
}

static void on_unpin(struct dma_buf_attachment *attachment)
{
	dma_resv_assert_held(attachment->dmabuf->resv);
	atomic_dec(&pins);
}

static struct sg_table *on_map(struct dma_buf_attachment *attachment, enum dma_data_direction direction)
{
	struct memory *memory = attachment->dmabuf->priv;
	u32 count = memory->count - !!(memory->flags & MAP_SHORT);
	struct scatterlist *each;
	struct sg_table *table;
	int error, i;

	dma_resv_assert_held(attachment->dmabuf->resv);
	if (memory->flags & REFUSE_MAP)
		return ERR_PTR(-ENXIO);
	table = kzalloc(sizeof(*table), GFP_KERNEL);
	if (!table)
		return ERR_PTR(-ENOMEM);
	error = sg_alloc_table(table, count, GFP_KERNEL);
	if (error)
		goto no_table;
	for_each_sgtable_sg(table, each, i)
		sg_set_page(each, memory->pages[i], memory->flags & MAP_ODD ? 512 : PAGE_SIZE, 0);
	error = dma_map_sgtable(attachment->dev, table, direction, 0);
	if (error)
		goto not_mapped;
	atomic_inc(&mappings);
	return table;
not_mapped:
	sg_free_table(table);
no_table:
	kfree(table);
	return ERR_PTR(error);
}

static void on_unmap(struct dma_buf_attachment *attachment, struct sg_table *table, enum dma_data_direction direction)
{
	dma_resv_assert_held(attachment->dmabuf->resv);
	dma_unmap_sgtable(attachment->dev, table, direction, 0);
	sg_free_table(table);
	kfree(table);
	atomic_dec(&mappings);
}

static void free_memory(struct memory *memory)
{
	while (memory->count)
		__free_page(memory->pages[--memory->count]);
	kfree(memory);
}

static void on_release(struct dma_buf *buffer)
{
	free_memory(buffer->priv);
	atomic_dec(&buffers);
}

static const struct dma_buf_ops operations = {
	.attach = on_attach,
	.detach = on_detach,
	.pin = on_pin,
	.unpin = on_unpin,
	.map_dma_buf = on_map,
	.unmap_dma_buf = on_unmap,
	.release = on_release,
};

static long export(const struct request *request)
{
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct memory *memory;
	struct dma_buf *buffer;
	int fd;

	if (!request->pages || request->pages > MOST_PAGES)
		return -EINVAL;
	memory = kzalloc(struct_size(memory, pages, request->pages), GFP_KERNEL);
	if (!memory)
		return -ENOMEM;
	memory->flags = request->flags;
	while (memory->count < request->pages) {
		struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);

		if (!page) {
			free_memory(memory);
			return -ENOMEM;
		}
		memory->pages[memory->count++] = page;
	}
	info.ops = &operations;
	info.size = (size_t)request->pages << PAGE_SHIFT;
	info.flags = O_RDWR | O_CLOEXEC;
	info.priv = memory;
	buffer = dma_buf_export(&info);
	if (IS_ERR(buffer)) {
		free_memory(memory);
		return PTR_ERR(buffer);
	}
	atomic_inc(&buffers);
	fd = dma_buf_fd(buffer, O_CLOEXEC);
	if (fd < 0)
		dma_buf_put(buffer);
	return fd;
}

static long act(struct file *file, unsigned int command, unsigned long argument)
{
	struct request request;
	struct dma_buf *buffer;

	if (command == EXPORT) {
		if (copy_from_user(&request, (void __user *)argument, sizeof(request)))
			return -EFAULT;
		return export(&request);
	}
	if (command != TAKE_BACK)
		return -ENOTTY;
	buffer = dma_buf_get(argument);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	if (buffer->ops != &operations) {
		dma_buf_put(buffer);
		return -EINVAL;
	}
	dma_resv_lock(buffer->resv, NULL);
	take_back(buffer);
	dma_resv_unlock(buffer->resv);
	dma_buf_put(buffer);
	return 0;
}

/* "buffers attachments pins mappings" */
static ssize_t tell(struct file *file, char __user *to, size_t nbytes, loff_t *offset)
{
	char text[64];
	int length = scnprintf(text, sizeof(text), "%d %d %d %d\n", atomic_read(&buffers), atomic_read(&attachments),
			       atomic_read(&pins), atomic_read(&mappings));

	return simple_read_from_buffer(to, nbytes, offset, text, length);
}

static const struct file_operations file_operations = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = act,
	.read = tell,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "exporter",
	.fops = &file_operations,
};
module_misc_device(device);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("dma-bufs for tests");

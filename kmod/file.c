// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/gpunvmeN: open, ioctl, mmap, and the end, in this order: the function is quiesced, its memory is taken away from
 * it, the memory is let go of. Whether a process closes the file, crashes or is killed makes no difference.
 */
#include <linux/fs.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "gpunvme.h"

/* The largest single mapping: its table of pages stays within what one allocation may be. */
#define MOST_BYTES (64ULL << 30)

static unsigned int max_mappings = 65536;
module_param(max_mappings, uint, 0644);
MODULE_PARM_DESC(max_mappings, "Mappings that one opener may have at a time");

static int gpunvme_open(struct inode *inode, struct file *file)
{
	struct gpunvme *owner = container_of(inode->i_cdev, struct gpunvme, cdev);
	struct gpunvme_opener *opener;
	int error = 0;

	if (!current->mm)
		return -EINVAL;
	/* Who drives an NVMe controller tells it where to write; without an IOMMU that is anywhere. */
	if (!gpunvme_is_confined(owner) && !capable(CAP_SYS_RAWIO))
		return -EPERM;
	if (atomic_cmpxchg(&owner->is_busy, 0, 1))
		return -EBUSY;
	opener = kzalloc(sizeof(*opener), GFP_KERNEL_ACCOUNT);
	if (!opener) {
		atomic_set(&owner->is_busy, 0);
		return -ENOMEM;
	}
	mutex_init(&opener->lock);
	xa_init_flags(&opener->mappings, XA_FLAGS_ALLOC1);
	opener->owner = owner;
	opener->inode_mapping = inode->i_mapping;
	opener->mm = current->mm;
	mmgrab(opener->mm);
	get_device(&owner->device);
	down_write(&owner->gate);
	if (owner->is_gone)
		error = -ENODEV;
	else
		error = gpunvme_reset(owner); /* whoever had it before may have left it running */
	if (!error) {
		gpunvme_allocate_vectors(owner);
		owner->opener = opener;
		atomic64_inc(&owner->counts.opened);
	}
	up_write(&owner->gate);
	if (error) {
		mmdrop(opener->mm);
		kfree(opener);
		atomic_set(&owner->is_busy, 0);
		put_device(&owner->device);
		return error;
	}
	file->private_data = opener;
	gpunvme_say(owner, "opened by %s (%d)\n", current->comm, task_pid_nr(current));
	return 0;
}

/* With the last reference to the file, mappings of BAR0 included. */
static int gpunvme_release(struct inode *inode, struct file *file)
{
	struct gpunvme_opener *opener = file->private_data;
	struct gpunvme *owner = opener->owner;

	down_write(&owner->gate);
	if (!owner->is_gone) {
		gpunvme_quiesce(owner);
		gpunvme_clear_vectors(owner);
		gpunvme_unmap_all(opener);
		gpunvme_free_vectors(owner);
		gpunvme_say(owner, "closed\n");
	}
	owner->opener = NULL;
	up_write(&owner->gate);
	xa_destroy(&opener->mappings);
	mmdrop(opener->mm);
	kfree(opener);
	atomic_set(&owner->is_busy, 0);
	put_device(&owner->device);
	return 0;
}

static long tell_info(struct gpunvme_opener *opener, void __user *argument, u32 size)
{
	struct gpunvme *owner = opener->owner;
	struct gpunvme_info info = {
		.size = sizeof(info),
		.version = GPUNVME_UAPI_VERSION,
		.bar_nbytes = owner->bar_nbytes,
		.mmap_nbytes = owner->mmap_nbytes,
		.vectors = owner->vectors,
		.flags = (gpunvme_is_confined(owner) ? GPUNVME_INFO_IOMMU : 0) | GPUNVME_INFO_DMABUF,
		.max_mappings = max_mappings,
	};

	if (copy_to_user(argument, &info, min_t(u32, size, sizeof(info))))
		return -EFAULT;
	if (size > sizeof(info) && clear_user(argument + sizeof(info), size - sizeof(info)))
		return -EFAULT;
	return 0;
}

static long check_map(const struct gpunvme_map *map)
{
	u64 unit = map->fd < 0 ? PAGE_SIZE : GPUNVME_UNIT;

	if (map->flags & ~GPUNVME_MAP_WRITE || map->handle)
		return -EINVAL;
	if (!map->nbytes || (map->address | map->nbytes) & (unit - 1) || map->address + map->nbytes < map->address)
		return -EINVAL;
	return map->nbytes > MOST_BYTES ? -E2BIG : 0;
}

/* Tells the caller the bus addresses and the handle; the mapping is in the table from then on. */
static long hand_out(struct gpunvme_opener *opener, struct gpunvme_mapping *mapping, const struct gpunvme_map *map,
		     struct gpunvme_map __user *argument)
{
	u64 units = mapping->nbytes / GPUNVME_UNIT;
	u64 *addresses = kvmalloc_array(units, sizeof(*addresses), GFP_KERNEL_ACCOUNT);
	long error;

	if (!addresses)
		return -ENOMEM;
	if (mapping->attachment)
		error = gpunvme_list_dmabuf(mapping, addresses);
	else
		error = gpunvme_list_addresses(mapping, 0, addresses);
	if (!error && copy_to_user(u64_to_user_ptr(map->addresses), addresses, units * sizeof(*addresses)))
		error = -EFAULT;
	kvfree(addresses);
	if (!error)
		error = xa_alloc(&opener->mappings, &mapping->handle, mapping, XA_LIMIT(1, INT_MAX),
				 GFP_KERNEL_ACCOUNT);
	if (!error && put_user(mapping->handle, &argument->handle)) {
		xa_erase(&opener->mappings, mapping->handle);
		error = -EFAULT;
	}
	return error;
}

static long map_memory(struct gpunvme_opener *opener, struct gpunvme_map *map, struct gpunvme_map __user *argument)
{
	enum dma_data_direction direction = map->flags & GPUNVME_MAP_WRITE ? DMA_BIDIRECTIONAL : DMA_TO_DEVICE;
	struct gpunvme_mapping *mapping;
	long error = check_map(map);

	if (error)
		return error;
	if (opener->count >= READ_ONCE(max_mappings))
		return -ENOSPC;
	if (map->fd < 0)
		mapping = gpunvme_map_user(opener, map->address, map->nbytes, direction);
	else
		mapping = gpunvme_map_dmabuf(opener, map->fd, map->address, map->nbytes, direction);
	if (IS_ERR(mapping))
		return PTR_ERR(mapping);
	error = hand_out(opener, mapping, map, argument);
	if (error) {
		gpunvme_unmap(mapping);
		return error;
	}
	++opener->count;
	atomic64_inc(&opener->owner->counts.mapped);
	gpunvme_say(opener->owner, "mapping %u: %llu bytes of %s\n", mapping->handle, mapping->nbytes,
		    mapping->attachment ? "a dma-buf" : "user memory");
	return 0;
}

static long unmap_memory(struct gpunvme_opener *opener, u32 handle)
{
	struct gpunvme_mapping *mapping = xa_erase(&opener->mappings, handle);

	if (!mapping)
		return -ENOENT;
	--opener->count;
	atomic64_inc(&opener->owner->counts.unmapped);
	gpunvme_say(opener->owner, "mapping %u ends\n", handle);
	gpunvme_unmap(mapping);
	return 0;
}

/* The caller's structure, as far as both sides know it; its first field is its size. */
static long take(void *to, size_t known, const void __user *argument, size_t least, u32 *size)
{
	if (get_user(*size, (const u32 __user *)argument))
		return -EFAULT;
	if (*size < least || *size > PAGE_SIZE)
		return -EINVAL;
	return copy_struct_from_user(to, known, argument, *size);
}

static long act(struct gpunvme_opener *opener, unsigned int command, void __user *argument)
{
	union {
		struct gpunvme_info info;
		struct gpunvme_map map;
		struct gpunvme_unmap unmap;
		struct gpunvme_vector vector;
	} given;
	long error;
	u32 size;

	switch (command) {
	case GPUNVME_INFO:
		if (get_user(size, (u32 __user *)argument))
			return -EFAULT;
		if (size < 2 * sizeof(u32) || size > PAGE_SIZE)
			return -EINVAL;
		return tell_info(opener, argument, size);
	case GPUNVME_MAP:
		error = take(&given.map, sizeof(given.map), argument, sizeof(given.map), &size);
		return error ? error : map_memory(opener, &given.map, argument);
	case GPUNVME_UNMAP:
		error = take(&given.unmap, sizeof(given.unmap), argument, sizeof(given.unmap), &size);
		return error ? error : unmap_memory(opener, given.unmap.handle);
	case GPUNVME_VECTOR:
		error = take(&given.vector, sizeof(given.vector), argument, sizeof(given.vector), &size);
		if (!error && given.vector.reserved)
			error = -EINVAL;
		return error ? error : gpunvme_set_vector(opener->owner, given.vector.vector, given.vector.fd);
	case GPUNVME_RESET:
		return gpunvme_reset(opener->owner);
	default:
		return -ENOTTY;
	}
}

static long gpunvme_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct gpunvme_opener *opener = file->private_data;
	struct gpunvme *owner = opener->owner;
	long error;

	if (down_read_killable(&owner->gate))
		return -EINTR;
	if (owner->is_gone) {
		error = -ENODEV;
	} else if (mutex_lock_killable(&opener->lock)) {
		error = -EINTR;
	} else {
		error = act(opener, command, (void __user *)argument);
		mutex_unlock(&opener->lock);
	}
	up_read(&owner->gate);
	if (error)
		atomic64_inc(&owner->counts.refused);
	return error;
}

static int gpunvme_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct gpunvme_opener *opener = file->private_data;
	struct gpunvme *owner = opener->owner;
	unsigned long nbytes = vma->vm_end - vma->vm_start;
	resource_size_t offset = (resource_size_t)vma->vm_pgoff << PAGE_SHIFT;
	int error;

	if (vma->vm_pgoff > owner->mmap_nbytes >> PAGE_SHIFT || nbytes > owner->mmap_nbytes - offset)
		return -EINVAL;
	if (!(vma->vm_flags & VM_SHARED) || vma->vm_flags & VM_EXEC)
		return -EINVAL;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	vm_flags_mod(vma, VM_IO | VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP | VM_DONTCOPY, VM_MAYEXEC);
#else
	vma->vm_flags |= VM_IO | VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP | VM_DONTCOPY;
	vma->vm_flags &= ~VM_MAYEXEC;
#endif
	vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
	/* Whoever takes the function away waits at the gate, then zaps: no mapping is made behind its back. */
	if (!down_read_trylock(&owner->gate))
		return -EAGAIN;
	error = owner->is_gone ? -ENODEV :
				 io_remap_pfn_range(vma, vma->vm_start, (owner->bar_start + offset) >> PAGE_SHIFT,
						    nbytes, vma->vm_page_prot);
	up_read(&owner->gate);
	return error;
}

const struct file_operations gpunvme_file_operations = {
	.owner = THIS_MODULE,
	.open = gpunvme_open,
	.release = gpunvme_release,
	.unlocked_ioctl = gpunvme_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = gpunvme_mmap,
	.llseek = noop_llseek,
};

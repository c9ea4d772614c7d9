// SPDX-License-Identifier: GPL-2.0
/*
 * The PCI driver: one character device for each NVMe function that was given to it by name.
 *
 * It has no table of ids, so that it never takes a drive by itself: the function's driver_override must name it
 * (Documentation/ABI/testing/sysfs-bus-pci).
 */
#include <linux/dma-mapping.h>
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "gpunvme.h"

#define NAME "gpunvme"
#define MOST_FUNCTIONS 256
#define NVME_LEAST_BAR 0x1008 /* registers, and the doorbells of the admin queue */
#define NVME_CLASS 0x010802

bool gpunvme_debug;
module_param_named(debug, gpunvme_debug, bool, 0644);
MODULE_PARM_DESC(debug, "Say in the kernel's log what is done");

static dev_t first_number;
static struct class *nodes;
static DEFINE_IDA(numbers);

static void free_owner(struct device *device)
{
	struct gpunvme *owner = container_of(device, struct gpunvme, device);

	ida_free(&numbers, owner->number);
	pci_dev_put(owner->pdev);
	kfree(owner);
}

/* Who can write to the MSI-X table can have the function write anywhere that interrupts go. */
static resource_size_t before_msix(struct pci_dev *pdev, resource_size_t nbytes)
{
	u32 table, pending;

	if (!pdev->msix_cap)
		return nbytes;
	pci_read_config_dword(pdev, pdev->msix_cap + PCI_MSIX_TABLE, &table);
	pci_read_config_dword(pdev, pdev->msix_cap + PCI_MSIX_PBA, &pending);
	if (!(table & PCI_MSIX_TABLE_BIR))
		nbytes = min_t(resource_size_t, nbytes, table & PCI_MSIX_TABLE_OFFSET);
	if (!(pending & PCI_MSIX_PBA_BIR))
		nbytes = min_t(resource_size_t, nbytes, pending & PCI_MSIX_PBA_OFFSET);
	return nbytes;
}

static int take_bar(struct gpunvme *owner)
{
	struct pci_dev *pdev = owner->pdev;

	owner->bar_start = pci_resource_start(pdev, 0);
	owner->bar_nbytes = pci_resource_len(pdev, 0);
	if (!(pci_resource_flags(pdev, 0) & IORESOURCE_MEM) || owner->bar_nbytes < NVME_LEAST_BAR ||
	    owner->bar_start & ~PAGE_MASK) {
		pci_err(pdev, "BAR0 is none of an NVMe controller\n");
		return -ENODEV;
	}
	owner->mmap_nbytes = before_msix(pdev, owner->bar_nbytes) & PAGE_MASK;
	owner->bar = pci_ioremap_bar(pdev, 0);
	return owner->bar ? 0 : -ENOMEM;
}

static int gpunvme_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct gpunvme *owner;
	int error;

	if (pdev->class != NVME_CLASS) {
		pci_err(pdev, "class %06x is no NVMe controller's\n", pdev->class);
		return -ENODEV;
	}
	owner = kzalloc(sizeof(*owner), GFP_KERNEL);
	if (!owner)
		return -ENOMEM;
	owner->pdev = pci_dev_get(pdev);
	init_rwsem(&owner->gate);
	owner->number = ida_alloc_max(&numbers, MOST_FUNCTIONS - 1, GFP_KERNEL);
	if (owner->number < 0) {
		error = owner->number;
		pci_dev_put(pdev);
		kfree(owner);
		return error;
	}
	device_initialize(&owner->device);
	owner->device.class = nodes;
	owner->device.parent = &pdev->dev;
	owner->device.release = free_owner;
	owner->device.devt = MKDEV(MAJOR(first_number), owner->number);
	cdev_init(&owner->cdev, &gpunvme_file_operations);
	owner->cdev.owner = THIS_MODULE;
	error = dev_set_name(&owner->device, NAME "%d", owner->number);
	if (error)
		goto no_device;
	error = pci_enable_device_mem(pdev);
	if (error)
		goto no_device;
	error = pci_request_mem_regions(pdev, NAME);
	if (error)
		goto disable;
	error = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
	if (error)
		goto release;
	dma_set_max_seg_size(&pdev->dev, UINT_MAX & PAGE_MASK);
	error = take_bar(owner);
	if (error)
		goto release;
	gpunvme_quiesce(owner);
	pci_set_drvdata(pdev, owner);
	error = cdev_device_add(&owner->cdev, &owner->device);
	if (error)
		goto unmap;
	gpunvme_debugfs_add(owner);
	gpunvme_say(owner, "is %s\n", dev_name(&owner->device));
	return 0;
unmap:
	iounmap(owner->bar);
release:
	pci_release_mem_regions(pdev);
disable:
	pci_disable_device(pdev);
no_device:
	put_device(&owner->device);
	return error;
}

/* The function goes, although somebody may have it open: nothing of theirs stays within its reach. */
static void gpunvme_remove(struct pci_dev *pdev)
{
	struct gpunvme *owner = pci_get_drvdata(pdev);

	cdev_device_del(&owner->cdev, &owner->device);
	gpunvme_debugfs_remove(owner);
	down_write(&owner->gate);
	owner->is_gone = true;
	gpunvme_quiesce(owner);
	if (owner->opener) {
		unmap_mapping_range(owner->opener->inode_mapping, 0, 0, 1);
		gpunvme_clear_vectors(owner);
		gpunvme_unmap_all(owner->opener);
		gpunvme_free_vectors(owner);
	}
	iounmap(owner->bar);
	owner->bar = NULL;
	up_write(&owner->gate);
	pci_release_mem_regions(pdev);
	pci_disable_device(pdev);
	put_device(&owner->device);
}

static pci_ers_result_t on_error(struct pci_dev *pdev, pci_channel_state_t state)
{
	return PCI_ERS_RESULT_DISCONNECT;
}

static const struct pci_error_handlers error_handlers = {
	.error_detected = on_error,
};

/* A controller that sleeps loses its queues, and nobody would tell the opener. */
static int gpunvme_suspend(struct device *device)
{
	struct gpunvme *owner = dev_get_drvdata(device);

	return atomic_read(&owner->is_busy) ? -EBUSY : 0;
}

static DEFINE_SIMPLE_DEV_PM_OPS(power, gpunvme_suspend, NULL);

static struct pci_driver driver = {
	.name = NAME,
	.probe = gpunvme_probe,
	.remove = gpunvme_remove,
	.err_handler = &error_handlers,
	.driver.pm = pm_sleep_ptr(&power),
	/* Who unbinds under load, or opens the file twice, is handled; DMA is the module's own to manage. */
};

static int __init gpunvme_init(void)
{
	int error = alloc_chrdev_region(&first_number, 0, MOST_FUNCTIONS, NAME);

	if (error)
		return error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	nodes = class_create(NAME);
#else
	nodes = class_create(THIS_MODULE, NAME);
#endif
	if (IS_ERR(nodes)) {
		error = PTR_ERR(nodes);
		goto no_class;
	}
	gpunvme_debugfs_start();
	error = pci_register_driver(&driver);
	if (error)
		goto no_driver;
	return 0;
no_driver:
	gpunvme_debugfs_end();
	class_destroy(nodes);
no_class:
	unregister_chrdev_region(first_number, MOST_FUNCTIONS);
	return error;
}
module_init(gpunvme_init);

static void __exit gpunvme_exit(void)
{
	pci_unregister_driver(&driver);
	gpunvme_debugfs_end();
	class_destroy(nodes);
	unregister_chrdev_region(first_number, MOST_FUNCTIONS);
	ida_destroy(&numbers);
}
module_exit(gpunvme_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("gpunvme developers");
MODULE_DESCRIPTION("An NVMe function for one user-space process, with user memory and dma-bufs mapped for it");
MODULE_VERSION(__stringify(GPUNVME_UAPI_VERSION));

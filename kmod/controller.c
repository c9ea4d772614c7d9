// SPDX-License-Identifier: GPL-2.0
/*
 * As much of NVMe as the module has to know: how to make a controller stop.
 *
 * NVM Express Base Specification 2.0, sections 3.1.3 (registers) and 3.5.1 (disabling); PCI: bus mastering.
 */
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/jiffies.h>

#include "gpunvme.h"

#define NVME_CAP 0x00
#define NVME_CC 0x14
#define NVME_CSTS 0x1c
#define NVME_CC_EN BIT(0)
#define NVME_CSTS_RDY BIT(0)
#define NVME_GONE 0xffffffff

/* CAP.TO (bits 31:24) counts 500 ms; no controller is waited for longer than its own word. */
static unsigned int patience_ms(struct gpunvme *owner)
{
	u32 low = readl(owner->bar + NVME_CAP);

	return 500 * max(low >> 24, 1u);
}

/**
 * gpunvme_quiesce() - end all DMA of the function
 * @owner: the function
 *
 * When it returns, the function reads and writes no memory any more, whatever the controller made of it: bus mastering
 * is off, and what was on its way has arrived. Only then may memory be unmapped. May sleep for as long as CAP.TO.
 */
void gpunvme_quiesce(struct gpunvme *owner)
{
	u32 configuration = readl(owner->bar + NVME_CC);
	bool idle = configuration == NVME_GONE;

	atomic64_inc(&owner->counts.quiesced);
	if (!idle) {
		unsigned long until = jiffies + msecs_to_jiffies(patience_ms(owner));

		if (configuration & NVME_CC_EN)
			writel(configuration & ~NVME_CC_EN, owner->bar + NVME_CC);
		for (;;) {
			u32 status = readl(owner->bar + NVME_CSTS);

			idle = !(status & NVME_CSTS_RDY) || status == NVME_GONE;
			if (idle || time_after(jiffies, until))
				break;
			usleep_range(100, 1000);
		}
	}
	/* Whatever it still wanted to do: from here on it cannot. */
	pci_clear_master(owner->pdev);
	if (!pci_wait_for_pending_transaction(owner->pdev))
		pci_warn(owner->pdev, "transactions are still pending\n");
	if (!idle) {
		atomic64_inc(&owner->counts.unwilling);
		pci_warn(owner->pdev, "the controller did not become idle in its own time; it is reset\n");
		pci_try_reset_function(owner->pdev);
		pci_clear_master(owner->pdev);
	}
	gpunvme_say(owner, "quiesced\n");
}

/**
 * gpunvme_reset() - disable the controller, and reset the function where it can be
 * @owner: the function
 *
 * Mappings stay, and bus mastering is on again.
 *
 * Return: 0, or a negative error if the function is gone.
 */
int gpunvme_reset(struct gpunvme *owner)
{
	gpunvme_quiesce(owner);
	pci_try_reset_function(owner->pdev);
	if (readl(owner->bar + NVME_CSTS) == NVME_GONE)
		return -ENODEV;
	pci_set_master(owner->pdev);
	return 0;
}

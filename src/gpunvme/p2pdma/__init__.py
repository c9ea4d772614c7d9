"""Files straight into and out of PCI memory that is mapped into this process, by the kernel's P2PDMA.

What is mapped (`mappings`), memory of an NVMe controller (`memory`), GPU memory (`gpu_mapping`), what the machine says
about why not (`reasons`), a small read that tells (`probe`), transfers (`movement`, `requests`).
"""

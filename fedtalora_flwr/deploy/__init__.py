"""A federation on separate machines: certificates, node keys, the processes, and a lab of them over ssh."""

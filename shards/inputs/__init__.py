"""From folders and archives to checked, decoded pairs of image and mask."""

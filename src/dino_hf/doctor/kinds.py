"""Kinds of findings: name, severity, description and advice."""

from typing import NamedTuple

SEVERITIES = ("error", "warning", "note")  # worst first


class Kind(NamedTuple):
    severity: (
        str  # error: training stops, or its result is wrong; warning: training works, but the data are likely wrong
    )
    what: str  # plural noun with a description; a count stands before it
    cure: str  # advice
    is_fixed: bool = False  # a cleaned copy corrects it or leaves it out


_COPY_THEM = "Copy the files again, or remove their entries"
_CONVERT = "Convert them to the layout of the format"

KINDS = {
    # files and images
    "image-missing": Kind(
        "error", "images whose file does not exist", f"{_COPY_THEM}. Upper and lower case must agree.", True
    ),
    "outside": Kind(
        "error",
        "files outside the data set's folder, which are not read",
        "Copy them into the folder, or allow them with --allow-outside.",
        True,
    ),
    "image-broken": Kind("error", "images that cannot be decoded", f"{_COPY_THEM}.", True),
    "image-too-large": Kind(
        "error",
        "images with more pixels than are read",
        "Scale them down, or cut them into parts, with their boxes.",
        True,
    ),
    "image-mode-unknown": Kind(
        "error",
        "images whose values have no known range, so their colours are unknown",
        "Save them with 8 or 16 bits. Only you know which value is white.",
        True,
    ),
    "image-frames": Kind(
        "note",
        "files with several pages or frames; only the first is used",
        "Save the others as separate images if they belong to the data.",
    ),
    "image-size-wrong": Kind(
        "error",
        "images whose stated width or height is not a positive number",
        "State width and height in pixels.",
        True,
    ),
    "image-resized": Kind(
        "error",
        "images whose size differs from the size in the annotations",
        "They were resized after annotation. Scale their boxes too, or use the original images.",
        True,
    ),
    "image-rotated": Kind(
        "error",
        "images that their EXIF orientation turns, while the boxes fit the stored pixels",
        "Turn the boxes, or save the images without the EXIF orientation.",
        True,
    ),
    "stated-size-wrong": Kind(
        "error",
        "images whose stated size is wrong; their boxes fit the actual size",
        "State the actual size.",
        True,
    ),
    "stated-size-unclear": Kind(
        "error",
        "images whose size differs from the size in the annotations, and whose boxes fit both sizes",
        "Look at them. Then write the actual size into the annotations, or scale or rotate the boxes like the image.",
    ),
    "image-orientation-unclear": Kind(
        "warning",
        "images with an EXIF orientation, where the stated size does not show whether the boxes are turned",
        "Look at them with --pictures. Training uses such images upright. Save them upright, without an EXIF orientation.",
    ),
    "image-mode": Kind(
        "warning",
        "16-bit images that use less than a quarter of the range, so they become dark in 8 bits",
        "Scale them to 8 bits yourself. Training and prediction divide the values by 257.",
    ),
    "image-size-unknown": Kind(
        "note",
        "images whose size the annotations do not state",
        "No action needed. Training reads the size from the image, but cannot find out whether an image was resized.",
    ),
    # entries of images
    "duplicate-image-id": Kind(
        "error", "images with the same id as another image", "Give each image its own id.", True
    ),
    "duplicate-file": Kind(
        "error",
        "images listed twice with the same file, so that each entry has a part of the boxes",
        "Merge them into one entry with all boxes.",
        True,
    ),
    "duplicate-image": Kind(
        "warning", "images that are a copy of another image in their split", "Keep one of them.", True
    ),
    "near-copy": Kind(
        "note", "images that look like another image in their split", "Keep one if they show the same picture."
    ),
    "leak": Kind(
        "error",
        "images that are also in another split, so AP is measured on training images",
        "Remove them from train.",
        True,
    ),
    "near-leak": Kind(
        "warning",
        "images that look like an image in another split, compressed again or scaled",
        "Remove them from train (--fix --drop-near-copies does so). Split videos and bursts by scene instead of by frame.",
    ),
    # layout and unit of all boxes of a data set
    "boxes-are-corners": Kind(
        "error",
        "boxes given as two corners instead of the layout of their format",
        f"{_CONVERT}.",
        True,
    ),
    "boxes-are-xywh": Kind(
        "error", "boxes given as (x, y, width, height) instead of the layout of their format", f"{_CONVERT}.", True
    ),
    "boxes-are-centres": Kind(
        "error",
        "boxes given as centre, width and height instead of the layout of their format",
        f"{_CONVERT}.",
        True,
    ),
    "boxes-are-normalised": Kind(
        "error",
        "boxes relative to their image instead of in pixels",
        f"{_CONVERT}.",
        True,
    ),
    "boxes-are-percent": Kind(
        "error",
        "boxes in percent of their image, from 0 to 100",
        f"{_CONVERT}.",
        True,
    ),
    "boxes-are-swapped": Kind(
        "error",
        "boxes with y before x, as (y0, x0, y1, x1) or (y, x, height, width)",
        f"{_CONVERT}.",
        True,
    ),
    "boxes-are-pixels": Kind(
        "error", "boxes in pixels instead of relative to their image", "Divide them by width and height.", True
    ),
    # single boxes
    "name-not-utf8": Kind(
        "error",
        "images whose file name is not UTF-8, for example from a zip file of another computer",
        "Rename the files.",
        True,
    ),
    "box-not-numbers": Kind(
        "error",
        "boxes that are not four finite numbers below 2,147,483,648",
        "Give (x, y, width, height) in pixels.",
        True,
    ),
    "box-negative": Kind(
        "error", "boxes with negative width or height", "Write the smaller corner first, then the size.", True
    ),
    "box-empty": Kind(
        "warning", "boxes without width or height, which training leaves out", "Remove them, or draw them again.", True
    ),
    "box-tiny": Kind(
        "warning",
        "boxes with a side of less than one pixel",
        "Draw them again, or remove them. They are too small to show an object.",
    ),
    "box-outside": Kind(
        "error", "boxes completely outside their image", "Scale them as the image was scaled, or remove them.", True
    ),
    "box-sticks-out": Kind(
        "warning", "boxes that extend beyond the border of their image", "Clip them to the image.", True
    ),
    "area-wrong": Kind(
        "warning",
        "areas that are not positive or larger than their box, which changes APs, APm and APl",
        "Recompute them.",
        True,
    ),
    "area-not-number": Kind(
        "error",
        "areas that are negative or not a number, at which training stops",
        "Recompute them, or remove the field.",
        True,
    ),
    "duplicate-box": Kind(
        "warning",
        "boxes that repeat another box of the same class",
        "Keep one. Every other counts as missed in evaluation.",
        True,
    ),
    "near-duplicate-box": Kind(
        "warning",
        "boxes that almost equal another box of the same class, so one object seems to be annotated twice",
        "Look at them and keep one of each pair (--fix --drop-near-copies does so).",
    ),
    "duplicate-box-other-class": Kind(
        "warning", "boxes that repeat a box of another class", "Decide which class is right."
    ),
    "duplicate-annotation-id": Kind(
        "warning",
        "annotations with the same id as another annotation; pycocotools ignores one of them",
        "Give each annotation its own id.",
        True,
    ),
    "box-whole-image": Kind(
        "note",
        "boxes that cover the whole image",
        "This is right for pictures of a single object. Otherwise the box may be a default value of a tool.",
    ),
    # ids of annotations
    "unknown-image": Kind(
        "error",
        "annotations with an image_id that no image has",
        "Correct image_id, or remove these annotations.",
        True,
    ),
    "image-of-other-split": Kind(
        "error",
        "annotations for an image of another split",
        "Move them to that split, or remove them.",
        True,
    ),
    "unknown-category": Kind(
        "error",
        "annotations with a category_id that no category has",
        "Add the category, or correct category_id.",
        True,
    ),
    # categories
    "no-categories": Kind("error", "data sets without categories", "List the categories, each with an id and a name."),
    "duplicate-category-id": Kind(
        "error", "categories with the same id as another category", "Give each category its own id.", True
    ),
    "duplicate-category-name": Kind(
        "error", "categories with the same name as another category", "Merge them, or give them different names.", True
    ),
    "similar-category-name": Kind(
        "warning",
        "categories whose name differs from another name only in case, spaces or punctuation",
        "Merge them if they are the same class.",
    ),
    "background-class": Kind(
        "warning",
        "categories named like background that have boxes; the detector needs no class for background",
        "Remove these boxes and the category.",
    ),
    "placeholder-category": Kind(
        "note",
        "categories without boxes that are named like background or are a group of other categories",
        "No action needed. Training leaves them out.",
    ),
    "category-without-boxes": Kind("warning", "categories without boxes", "Remove them, or annotate some objects."),
    "category-not-in-train": Kind(
        "warning",
        "categories with boxes in another split, but not in train",
        "Split the data again. The model cannot learn these categories.",
    ),
    "category-not-in-validation": Kind(
        "warning",
        "categories with boxes in train, but not in validation",
        "Split the data again. No AP is measured for these categories.",
    ),
    "class-imbalance": Kind(
        "warning",
        "categories with less than a hundredth of the boxes of the most frequent category",
        "Annotate more of them, or expect a low AP.",
    ),
    # splits
    "no-images": Kind("error", "splits without images", "Remove the split, or add its images.", True),
    "split-not-here": Kind(
        "note", "test splits without boxes and without image files", "No action needed. They are skipped."
    ),
    "no-boxes": Kind("error", "data sets without any box", "Check that the annotations are in the right place."),
    "only-crowds": Kind(
        "error",
        "splits whose boxes are all marked as crowd, so the model cannot learn from them",
        "Set iscrowd to 0. Some tools write 1 for every mask.",
    ),
    "unlabelled-train": Kind(
        "error", "training splits without any box", "Check that their annotations are in the right place."
    ),
    "unlabelled-split": Kind(
        "warning", "splits without any box", "Use them only for prediction. Training and evaluation need boxes."
    ),
    "many-boxes": Kind(
        "warning",
        "images with more than 300 boxes, which is the number of detections that are kept",
        "Cut them into tiles. If memory is short, set max_denoising_queries in the configuration.",
    ),
    "crowd": Kind(
        "note",
        "regions marked as crowd",
        "They are not targets. Detections inside them count neither as right nor as wrong.",
    ),
    "image-without-boxes": Kind(
        "note",
        "images without boxes",
        "This is right if they show no objects. The model learns from them what background is.",
    ),
}
UNREADABLE = Kind("error", "entries that cannot be read", "Correct or remove them.", True)
UNREAD_IMAGES = {"image-missing", "image-broken", "image-too-large", "image-mode-unknown", "outside"}

"""What can be wrong with a data set: a name for each, how bad it is, and what to do."""

from typing import NamedTuple

SEVERITIES = ("error", "warning", "note")  # worst first


class Kind(NamedTuple):
    severity: (
        str  # error: training stops, or learns or measures the wrong; warning: it works, but is likely not meant so
    )
    what: str  # is counted
    cure: str
    is_fixed: bool = False  # by a cleaned copy, where it can be sure


_COPY_THEM = "Copy the files again, or take their entries out"
_CONVERT = "Convert them to what the format says"

KINDS = {
    # files and images
    "image-missing": Kind(
        "error", "images whose file does not exist", f"{_COPY_THEM}; look at upper and lower case.", True
    ),
    "outside": Kind(
        "error",
        "files outside of the data set's folder, which are not read",
        "Copy them into the folder, or allow them with --allow-outside.",
        True,
    ),
    "image-broken": Kind("error", "images that cannot be decoded", f"{_COPY_THEM}.", True),
    "image-too-large": Kind(
        "error",
        "images of more pixels than are read",
        "Scale them down, or cut them into parts, with their boxes.",
        True,
    ),
    "image-mode-unknown": Kind(
        "error",
        "images whose values have no known range, so that no colour can be told",
        "Save them with 8 or 16 bits: only you know which value is white.",
        True,
    ),
    "image-frames": Kind(
        "note",
        "files of several pages or frames, of which only the first is used",
        "Save the others as images of their own if they belong to the data.",
    ),
    "image-size-wrong": Kind(
        "error", "images whose stated width or height is not a positive number", "State the size in pixels.", True
    ),
    "image-resized": Kind(
        "error",
        "images of another size than stated",
        "They were resized after they were annotated: scale their boxes too, or take the original images.",
        True,
    ),
    "image-rotated": Kind(
        "error",
        "images that their EXIF orientation turns, while the boxes are for the pixels as stored",
        "Turn the boxes, or save the images without that tag.",
        True,
    ),
    "stated-size-wrong": Kind(
        "error",
        "images whose stated size is wrong: their boxes fit the image as it is",
        "State the size of the image.",
        True,
    ),
    "stated-size-unclear": Kind(
        "error",
        "images of another size than stated, whose boxes fit both sizes",
        "Look at them: then state the size of the image, or bring the boxes to it as the image was scaled or turned.",
    ),
    "image-orientation-unclear": Kind(
        "warning",
        "images with an EXIF orientation that the stated size neither confirms nor denies",
        "Look at them, as --pictures draws them; training shows such images upright. Save them upright and without the tag.",
    ),
    "image-mode": Kind(
        "warning",
        "images of 16 bits that use less than a quarter of the range, so they become dark with 8 bits",
        "Scale them to 8 bits yourself: training and prediction divide by 257 and do not know which range matters.",
    ),
    "image-size-unknown": Kind(
        "note",
        "images whose size the annotations do not state",
        "Fine: training reads it from the images; whether they were resized cannot be told.",
    ),
    # entries of images
    "duplicate-image-id": Kind("error", "images with the id of another one", "Give each image an id of its own.", True),
    "duplicate-file": Kind(
        "error",
        "entries for a file that another entry has too, so that each has a part of the boxes",
        "Make them one entry with all boxes.",
        True,
    ),
    "duplicate-image": Kind(
        "warning", "images that are a copy of another one in their split", "Keep one of them.", True
    ),
    "near-copy": Kind(
        "note", "images that look like another one in their split", "Keep one if they are the same picture."
    ),
    "leak": Kind(
        "error",
        "images that are in another split too, so that AP is measured on what was trained on",
        "Take them out of train.",
        True,
    ),
    "near-leak": Kind(
        "warning",
        "images that look like one in another split, compressed again or scaled",
        "Take them out of train (--fix does with --drop-near-copies), and split videos and bursts by scene instead of by frame.",
    ),
    # numbers of boxes, all of a data set
    "boxes-are-corners": Kind(
        "error",
        "boxes that are two corners instead of what their format says",
        f"{_CONVERT}.",
        True,
    ),
    "boxes-are-xywh": Kind(
        "error", "boxes that are (x, y, width, height) instead of what their format says", f"{_CONVERT}.", True
    ),
    "boxes-are-centres": Kind(
        "error",
        "boxes that are centre, width and height instead of what their format says",
        f"{_CONVERT}.",
        True,
    ),
    "boxes-are-normalised": Kind(
        "error",
        "boxes that are relative to their image instead of in pixels",
        f"{_CONVERT}.",
        True,
    ),
    "boxes-are-percent": Kind(
        "error",
        "boxes that are in percent of their image, from 0 to 100",
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
        "error", "boxes in pixels where they must be relative to their image", "Divide them by width and height.", True
    ),
    # numbers of boxes, one by one
    "name-not-utf8": Kind(
        "error", "images whose file name is not UTF-8, as from a zip of another computer", "Rename the files.", True
    ),
    "box-not-numbers": Kind(
        "error",
        "boxes that are not four finite numbers of a sensible size",
        "Give (x, y, width, height) in pixels.",
        True,
    ),
    "box-negative": Kind(
        "error", "boxes of negative width or height", "Give the smaller corner first, then the size.", True
    ),
    "box-empty": Kind(
        "warning", "boxes without width or height, which training leaves out", "Remove them, or draw them again.", True
    ),
    "box-tiny": Kind(
        "warning",
        "boxes with a side of less than one pixel",
        "Draw them again, or remove them: they do not show any part of the image.",
    ),
    "box-outside": Kind(
        "error", "boxes wholly outside of their image", "Scale them as the image was scaled, or remove them.", True
    ),
    "box-sticks-out": Kind(
        "warning", "boxes that reach over the border of their image", "Clip them to the image.", True
    ),
    "area-wrong": Kind(
        "warning",
        "areas that are not positive or more than that of their box, which moves boxes between sizes in AP",
        "Recompute them.",
        True,
    ),
    "area-not-number": Kind(
        "error",
        "areas that are negative or no number, where training stops",
        "Recompute them, or leave them out.",
        True,
    ),
    "duplicate-box": Kind(
        "warning", "boxes that repeat another one of the same class", "Keep one: the others can only be missed.", True
    ),
    "near-duplicate-box": Kind(
        "warning",
        "boxes that cover another one of the same class almost wholly, so that one thing seems to be annotated twice",
        "Look at them and keep one of each two; --fix does with --drop-near-copies.",
    ),
    "duplicate-box-other-class": Kind(
        "warning", "boxes that repeat another one as another class", "Decide which class is meant."
    ),
    "duplicate-annotation-id": Kind(
        "warning",
        "annotations with the id of another one, of which pycocotools forgets one",
        "Give each an id of its own.",
        True,
    ),
    "box-whole-image": Kind(
        "note",
        "boxes that are the whole image",
        "Fine for pictures of one thing. Otherwise they may be a default.",
    ),
    # what annotations point at
    "unknown-image": Kind(
        "error",
        "annotations with an id that no image has",
        "Correct image_id (a number is not its text), or remove them.",
        True,
    ),
    "image-of-other-split": Kind(
        "error",
        "annotations for an image that is in another split",
        "Move them to the annotations of that split, or remove them.",
        True,
    ),
    "unknown-category": Kind(
        "error", "annotations with an id that no category has", "Add the category, or correct category_id.", True
    ),
    # categories
    "no-categories": Kind("error", "data sets without categories", "List the categories, each with id and name."),
    "duplicate-category-id": Kind(
        "error", "categories with the id of another one", "Give each category an id of its own.", True
    ),
    "duplicate-category-name": Kind(
        "error", "categories with the name of another one", "Make them one, or name them apart.", True
    ),
    "similar-category-name": Kind(
        "warning",
        "categories whose name differs from another one in case, spaces or punctuation only",
        "Make them one if they are the same.",
    ),
    "background-class": Kind(
        "warning",
        "categories named like background that boxes have, while the detector knows background without a class",
        "Remove these boxes and the category.",
    ),
    "placeholder-category": Kind(
        "note",
        "categories that no box has, named like background or as the group of others",
        "Fine: training leaves them out.",
    ),
    "category-without-boxes": Kind("warning", "categories that no box has", "Remove them, or annotate some."),
    "category-not-in-train": Kind(
        "warning",
        "categories that training has no box of, but another split has",
        "Split the data again; they cannot be learnt.",
    ),
    "category-not-in-validation": Kind(
        "warning",
        "categories that training has boxes of, but validation has not",
        "Split the data again; nothing is measured for them.",
    ),
    "class-imbalance": Kind(
        "warning",
        "categories with less than a hundredth of the boxes of the commonest one",
        "Annotate more of them, or expect a low AP.",
    ),
    # splits
    "no-images": Kind("error", "splits without images", "Remove the split, or add its images.", True),
    "split-not-here": Kind(
        "note", "test splits without boxes of which no image is here", "Fine: they are passed over."
    ),
    "no-boxes": Kind(
        "error", "data sets without any box", "Look whether the annotations lie where they are looked for."
    ),
    "only-crowds": Kind(
        "error",
        "splits whose boxes are all marked as crowd, so there is nothing to learn",
        "Set iscrowd to 0: some tools write 1 for every mask.",
    ),
    "unlabelled-train": Kind(
        "error", "training splits without any box", "Look whether their annotations lie where they are looked for."
    ),
    "unlabelled-split": Kind(
        "warning", "splits without any box", "Predict on them; nothing can be trained or measured there."
    ),
    "many-boxes": Kind(
        "warning",
        "images with more than 300 boxes, the number of detections that are kept",
        "Cut them into tiles; set max_denoising_queries in the configuration if memory is short.",
    ),
    "crowd": Kind(
        "note", "regions marked as crowd", "They are no targets: detections there count neither as right nor as wrong."
    ),
    "image-without-boxes": Kind(
        "note", "images without boxes", "Fine if there is nothing on them: they teach what is background."
    ),
}
UNREADABLE = Kind("error", "entries that cannot be read", "Correct or remove them.", True)
UNREAD_IMAGES = {"image-missing", "image-broken", "image-too-large", "image-mode-unknown", "outside"}

"""The words from which the demo checkpoint's tokenizer is trained, and the sentences made of them.

Common English words, with the everyday objects, colours, shapes and relations that questions about pictures use. The
corpus is generated, so that the tokenizer is the same wherever it is built and nothing has to be downloaded.
"""

from collections.abc import Iterator
from itertools import cycle, islice
from random import Random

OBJECTS = """
airplane animal apple arm arrow astronaut baby background backpack bag ball balloon banana band bank bar baseball
basket bat bathroom beach bear bed bedroom bee bench bicycle bike bird blanket board boat body book bookshelf boot
bottle bowl box boy branch bread brick bridge broccoli brush bucket building bus bush butterfly button cabinet cable
cake camera can candle cap car card carpet carrot cart castle cat ceiling cell chain chair chart child children church
circle city clock cloth clothes cloud coast coat coffee coin column computer cone cookie corner couch counter cow crane
cross crowd crown cube cup curtain cushion cylinder deer desk diagram dish document dog dolphin donut door dot dress
drink drum duck ear earth edge egg elephant engine eye face factory fan farm feather fence field figure finger fire
fireplace fish flag floor flower fly food foot football forest fork fountain fox frame frisbee frog fruit game garage
garden gate giraffe girl glass glasses glove goat grape graph grass ground group guitar hair hall hammer hand handbag
handle hat head headline heart helmet hexagon highway hill hole home hood horse hospital hotel house ice image insect
instrument island jacket jar jeans jewel juice kettle key keyboard kid kitchen kite kitten knee knife label ladder lake
lamp lane laptop leaf leaves leg lemon letter library light line lion lips lock logo luggage machine magazine man map
mark market mask meal meat men menu meter microphone microwave milk mirror monitor monkey moon mountain mouse mouth mug
mushroom nail name neck necklace needle newspaper nose notebook number ocean office onion orange oven owl page paint
painting pair pan pants paper park parking path patch pattern pavement pen pencil pentagon people pepper person phone
photo photograph piano picture piece pillow pipe pizza plane planet plant plate platform player pocket pole police pond
pool portrait poster pot potato purse puppy pyramid rabbit racket radio rail railway rain rainbow receipt rectangle
refrigerator remote restaurant ribbon ring river road robot rock rocket roof room rope rose ruler sail sailor salad
sand sandwich scarf scene school scissors screen sea seat shadow shape sheep shelf shell ship shirt shoe shop shore
shoulder shower sidewalk sign sink skateboard ski skirt sky sleeve snake snow snowboard soap soccer sock sofa soldier
soup space spaceship spacesuit sphere spoon sports spot square stadium stage stair stairs stand star station statue
steam steel step stick stone stool store storm stove strawberry street string stripe student suit suitcase sun
sunglasses surface surfboard swan sweater symbol table tail teacher team teddy telephone television temple tennis tent
text texture thing tie tiger tile tire title toaster toilet tomato tool tooth toothbrush top towel tower town toy track
tractor traffic train transport trash tray tree triangle truck trunk tube turtle umbrella uniform vase vegetable
vehicle video view village violin wall watch water wave wheel wheelchair whale wind window wine wing wire wolf woman
women wood word worker world yard zebra
""".split()

QUALITIES = """
red orange yellow green blue purple pink brown black white grey gray cyan magenta gold silver dark bright light pale
big small large little tiny huge tall short long wide narrow thick thin round square flat open closed full empty old
new young clean dirty wet dry hot cold warm cool soft hard smooth rough wooden metal plastic striped dotted plain
colorful beautiful pretty happy sad angry calm quiet loud fast slow heavy left right upper lower middle central front
rear near far first second third last next other same different many several few whole half single double
""".split()

VERBS = """
see look show find count describe tell name read write say ask answer explain hold wear carry ride drive walk run jump
sit stand lie sleep eat drink cook play throw catch kick hit swim fly sail climb fall open close cut wash clean paint
draw build make take give put move turn stop start wait work talk smile laugh cry point cover contain include appear
happen belong compare choose list identify match locate visible hidden holding wearing sitting standing riding walking
running looking playing eating flying parked
""".split()

RELATIONS = """
on in at under over above below behind between beside near inside outside around across along through against next
front top of to with without from into onto toward among
""".split()

FUNCTION_WORDS = """
a an the this that these those is are was were be been being am do does did have has had can could will would shall
should may might must not no yes and or but if then than because so while when where who whom whose what which why how
I you he she it we they me him her us them my your his its our their one two three four five six seven eight nine ten
eleven twelve twenty hundred thousand there here some any all both each every none nothing something anything someone
only also very too just more most less least much again still already ever never always often about as by for after
before during until up down out off please question assistant user system image images answer
""".split()

PATTERNS = (
    "What color is the {0} {r} the {q} {1}?",
    "How many {q} {0}s are there in the image?",
    "Is there a {q} {0} {r} the {1}? Answer yes or no.",
    "There is a {q} {0} {r} the {1}.",
    "USER: What is the {0} doing? ASSISTANT: The {0} can {v} the {1}.",
    "Describe the {0} and the {1} in detail, please.",
    "The {q} {0} and a {1} {v} {f} {r} it.",
    "Which {0} is {q}, the one {r} the {1} or the other {0}?",
    "{v} {f} {q} {0} {f} {v} {1}",
    "The answer is {n}. I see {n} {0}s, {f} {n} {1}s!",
)


def sentences(count: int = 20_000) -> Iterator[str]:
    """`count` sentences, always the same ones."""
    draws = Random(0)

    def pick(words: list[str]) -> str:
        return words[int(draws.random() * len(words))]  # the one method whose numbers Python promises to keep

    for index, pattern in enumerate(islice(cycle(PATTERNS), count)):
        yield pattern.format(
            pick(OBJECTS),
            pick(OBJECTS),
            q=pick(QUALITIES),
            v=pick(VERBS),
            r=pick(RELATIONS),
            f=pick(FUNCTION_WORDS),
            n=index % 1000,
        )

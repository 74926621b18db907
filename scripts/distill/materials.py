"""What training prompts are made of: templates and what fills them, items separated by | or a new line.

Kinds of everyday questions come from what people ask an assistant; nothing here fills into a prompt of heldout.json (a test
checks it), e.g. tennis is no {sport} and the Mona Lisa no {work}.
"""

TOPICS = """a bicycle|the water cycle|volcanoes|the Roman Empire|photosynthesis|machine learning|jazz music
chess openings|black holes|healthy breakfasts|time management|the French Revolution|vaccines|electric cars
the stock market|meditation|sourdough bread|the ocean floor|dinosaurs|the human heart|public speaking|recycling
solar panels|the Great Wall of China|bees|coffee|gravity|the internet|poetry|basketball|gardening|earthquakes
the immune system|inflation|Shakespeare|DNA|the moon landing|rainforests|yoga|democracy|antibiotics
computer viruses|the Silk Road|painting|sleep|whales|logic|probability|a job interview|learning a language
databases|operating systems|compilers|sorting algorithms|recursion|climate change|the periodic table|electricity
magnets|the speed of light|ancient Egypt|the Renaissance|opera|film editing|photography|hiking|camping|swimming
running a marathon|vegetarian cooking|pasta|cheese|tea ceremonies|pottery|knitting|carpentry|bridges|skyscrapers
trains|airplanes|rockets|satellites|telescopes|microscopes|bacteria|the brain|memory|dreams|emotions|friendship
leadership|teamwork|negotiation|budgeting|taxes|insurance|small businesses|marketing|social media|privacy
encryption|passwords|open source software|video games|robots|drones|3D printing|quantum computers|statistics
geometry|algebra|calculus|prime numbers|fractions|percentages|maps|deserts|rivers|islands|glaciers|hurricanes
the seasons|birds|cats|dogs|horses|elephants|insects|mushrooms|trees|flowers|soil|farming|nutrition|exercise
first aid|the flu|dental care|stress|education|libraries|museums|newspapers|radio|television|theatre|dance
fashion|architecture|furniture|money|trade|law|human rights|philosophy|ethics|religion|mythology|fairy tales
science fiction|travel|Japan|Brazil|India|Kenya|Canada|Australia|Italy|New York|Paris|the Sahara|Mars|Jupiter
comets|atoms|chemical reactions|plastics|glass|steel"""
TEMPLATES = """Explain {t} to a ten-year-old.|What is the most interesting fact about {t}?
Write a short story about {t}.|Write a poem about {t}.|List five things everyone should know about {t}.
How does {t} work?|Why is {t} important?|Give me a brief history of {t}.
What are common misconceptions about {t}?|Summarize {t} in three sentences.
Write a letter to a friend about {t}.|Compare {t} and {u}.|What are the advantages and disadvantages of {t}?
Create a quiz with three questions about {t}.|Write a dialogue between two people discussing {t}.
What would happen if {t} did not exist?|Give tips for a beginner interested in {t}.
Write a product description about {t}.|Describe {t} in simple words.|Write an email to my manager about {t}.
What is the relation between {t} and {u}?|Can you help me understand {t}?|Write an essay introduction about {t}.
Tell me a joke about {t}.|Make a step-by-step plan to learn about {t}.
What questions should I ask an expert on {t}?|Define {t}.
Rewrite this sentence more formally: "I really like {t} and {u}."|Is {t} dangerous?
How has {t} changed over time?|Write a news article about {t}.|Write a tweet about {t}.
Who are famous people connected with {t}?|What tools do I need for {t}?|Brainstorm ten ideas about {t} and {u}.
Translate "I love {t}" into French and Spanish.|Write a Python class that models {t}.
Write a short speech about {t}.|What is {t}?|hi, i want to talk about {t}"""
EVERYDAY = """What is the capital of {place}?|What is the population of {place}?
Which languages are spoken in {place}?|What is {place} famous for?|Plan a {days}-day trip to {place}.
When is the best time to visit {place}?|What should I eat in {place}?|Name three cities in {place}.
Tell me something surprising about {place}.|Describe the climate of {place}.|Who was {person}?
What did {person} discover or achieve?|When did {person} live?|Why is {person} still remembered today?
Write a short biography of {person}.|Imagine an interview with {person}.|Who wrote {work}?|What is {work} about?
Summarize {work}.|Who are the main characters of {work}?|What is the moral of {work}?
Review {work} in a few sentences.|Give me a recipe for {food}.|How do I make {food} at home?
What goes well with {food}?|Is {food} healthy?|What can I use instead of eggs in {food}?
How long does {food} keep in the fridge?|Write a menu that includes {food}.|What does a {job} do?
How do I become a {job}?|What skills does a {job} need?|Describe a day in the life of a {job}.
Write a cover letter for a {job}.|Write a job advertisement for a {job}.
What questions are asked when a {job} is hired?|How do {animal} sleep?|What do {animal} eat?
Where do {animal} live?|How long do {animal} live?|Why do {animal} matter?|Write a fable about {animal}.
Five facts about {animal}, please.|Can {animal} be kept as pets?|How do {animal} raise their young?
How do I clean a {thing}?|How do I repair a {thing}?|How does a {thing} work?
What should I look for when I buy a {thing}?|Who invented the {thing}?|Write a riddle about a {thing}.
Describe a {thing} to someone who has never seen one.|My {thing} is broken. What should I do?
Give me a name for a shop that sells every kind of {thing}.|Sell me a {thing}.
What is the difference between {t} and {u}?|What is {t}, in one sentence?|Explain {t} like a teacher would.
What does the word {word} mean?|Give me two synonyms for {word}.|What is the opposite of {word}?
Use {word} in a sentence.|Write a {form} about {t}.|Write a {form} about {animal}.
Write a {form} for my {relative}.|Write a {form} about a {thing}.
Suggest a gift for my {relative}, who likes {hobby}.|How do I start with {hobby}?|What do I need for {hobby}?
Is {hobby} good exercise?|My {relative} wants to try {hobby}. Any advice?|How can I get better at {hobby}?
I feel {feeling}. What can I do?|Why do people feel {feeling}?
Write a kind message to my {relative}, who feels {feeling}.|How can I {goal}?|Give me {days} tips to {goal}.
Why is it so hard to {goal}?|Make a plan that helps me to {goal}.|Should I {goal} or wait?
Write a checklist for someone who wants to {goal}.|What are the benefits if I {goal}?|What causes {ailment}?
What helps against {ailment}?|When should I see a doctor about {ailment}?|How do I prevent {ailment}?
What happened in the year {year}?|What was life like in {year}?|Do you know why {phenomenon}?
Explain simply why {phenomenon}.|Explain the rules of {sport}.|How many players does {sport} need?
Who is the best at {sport}?|What is the history of {sport}?|Give reasons for and against {issue}.
Do you think {issue} is a good idea?|Write a short debate about {issue}.|How many {unit} are in {x} {unit2}?
Convert {x} {unit} to {unit2}.|Recommend a book about {t}.|Recommend a film about {hobby}.
Make a table that compares {place} and {place2}.|Write a conversation between a {job} and a {job2}.
Tell me a story about a {job} who finds a {thing}.|Begin a novel that takes place in {place}.
Tell me a bedtime story with {animal}.|Make up a slogan for a brand of {food}.|What is the plural of {word}?
Translate "Where is the {thing}?" into Italian.|Correct this sentence: "my {relative} dont likes {food}".
Who are you?|What can you do?|Thanks, that helps!|hello|Good morning!"""
TASKS = """Write a Python function that {a}.|Write a JavaScript function that {a}.
How do I write a program that {a}?|Explain, with an example in Python, code that {a}.
Write a unit test for a function that {a}."""
ACTIONS = """reverses a string|sorts a list of numbers|counts the words in a file
finds the largest number in a list|checks whether a number is prime|computes the factorial of n
merges two dictionaries|removes duplicates from a list|reads a CSV file|computes the Fibonacci sequence
finds the median|flattens a nested list|checks for palindromes|converts Celsius to Fahrenheit
searches a sorted array|parses a date|downloads a web page|draws a triangle of stars
computes the greatest common divisor|implements a stack|implements a queue|rolls two dice
shuffles a deck of cards|counts vowels|validates an email address|transposes a matrix|adds two matrices
groups words by length|finds anagrams"""
SUMS = """What is {x} + {y}?|What is {x} - {y}?|What is {x} times {y}?|Calculate {x} / {y}.|What is {y}% of {x}?
A shop sells {y} apples a day. How many does it sell in {x} days?
If a train travels {x} km in {y} hours, how fast is it?
Tom has {x} marbles and gives {y} away. How many are left?|Solve for x: {y}x = {x}.
What is the average of {x} and {y}?
I have {x} dollars and each book costs {y} dollars. How many books can I buy?|Round {x}.{y} to the nearest ten."""
SLOTS = {
    "place": """Spain|Portugal|Germany|Norway|Sweden|Poland|Greece|Turkey|Egypt|Morocco|Nigeria|Ghana
South Africa|Ethiopia|Mexico|Peru|Chile|Argentina|Colombia|Cuba|China|South Korea|Vietnam|Thailand|Indonesia
Nepal|Pakistan|Iran|Israel|New Zealand|Ireland|Scotland|Hungary|Finland|Switzerland|Austria|Belgium|Denmark
Romania|Ukraine|London|Rome|Berlin|Tokyo|Vienna|Prague|Lisbon|Chicago|San Francisco|Texas|Hawaii|Alaska|the Alps
the Andes|Singapore|Hong Kong|Istanbul|Cairo|Moscow|Dublin|Amsterdam""",
    "person": """Albert Einstein|Isaac Newton|Charles Darwin|Galileo Galilei|Nikola Tesla|Thomas Edison
Ada Lovelace|Alan Turing|Leonardo da Vinci|Vincent van Gogh|Frida Kahlo|Mozart|Beethoven|Johann Sebastian Bach
Napoleon|Julius Caesar|Cleopatra|Alexander the Great|Abraham Lincoln|George Washington|Mahatma Gandhi
Martin Luther King|Nelson Mandela|Rosa Parks|Jane Austen|Charles Dickens|Mark Twain|Leo Tolstoy|Homer|Plato
Aristotle|Socrates|Confucius|Buddha|Joan of Arc|Queen Victoria|Amelia Earhart|Neil Armstrong|Yuri Gagarin
Florence Nightingale|Louis Pasteur|Alexander Fleming|Gregor Mendel|Christopher Columbus|Marco Polo""",
    "work": """Hamlet|Macbeth|Don Quixote|War and Peace|The Odyssey|The Iliad|Moby-Dick|Frankenstein|Dracula
Jane Eyre|Emma|1984|Animal Farm|The Great Gatsby|The Hobbit|Alice in Wonderland|Peter Pan|Pinocchio
Little Red Riding Hood|Hansel and Gretel|Snow White|The Ugly Duckling|The Lion King|The Little Prince
Robinson Crusoe|Treasure Island|Oliver Twist|A Christmas Carol|Faust|The Tortoise and the Hare|Sherlock Holmes
The Jungle Book|Sleeping Beauty|The Three Little Pigs|Crime and Punishment""",
    "food": """pizza|tomato soup|chocolate cake|apple pie|fried rice|omelettes|chicken curry|lasagna|guacamole
hummus|falafel|sushi|bread|waffles|lentil soup|potato salad|roast chicken|vegetable stew|pancakes without milk
lemonade|hot chocolate|granola|oatmeal|tacos|dumplings|risotto|mashed potatoes|cookies|muffins|ice cream|jam
pickles|salad dressing|burgers|noodles|fish and chips|tofu""",
    "job": """teacher|doctor|plumber|baker|pilot|farmer|carpenter|programmer|journalist|librarian|firefighter
police officer|chef|scientist|engineer|architect|dentist|gardener|musician|painter|translator|accountant
mechanic|electrician|sailor|photographer|shop assistant|bus driver|judge|psychologist|waiter|hairdresser|tailor
astronaut|software tester|project manager|data analyst""",
    "animal": """lions|tigers|bears|wolves|foxes|owls|eagles|parrots|dolphins|sharks|octopuses|turtles|snakes
frogs|spiders|ants|butterflies|rabbits|squirrels|hedgehogs|bats|camels|giraffes|zebras|monkeys|gorillas
kangaroos|koalas|pandas|polar bears|seals|goldfish|chickens|cows|sheep|goats|pigs|ducks|crows|hummingbirds
salmon|jellyfish|crabs|lizards|crocodiles|mice""",
    "thing": """bicycle|washing machine|printer|phone|camera|guitar|piano|clock|lamp|umbrella|backpack|tent
mirror|candle|oven|kettle|microwave|vacuum cleaner|keyboard|television|chair|table|sofa|bed|door|window|key
wallet|hat|jacket|pair of glasses|watch|pen|notebook|ladder|hammer|drill|saw|bucket|broom|toaster|blender
coffee machine|telescope|compass|thermometer|battery|car|boat""",
    "word": """brave|curious|gentle|sad|angry|beautiful|large|tiny|quick|slow|honest|clever|lazy|generous
ancient|modern|fragile|serendipity|ephemeral|resilient|ambiguous|eloquent|meticulous|nostalgia|empathy|paradox
diligent|obsolete|pragmatic|candid""",
    "form": """poem|short story|haiku|limerick|song|letter|speech|joke|dialogue|diary entry|toast|birthday card
press release|blog post|thank-you note|invitation|script for a short video|news report|fairy tale|text message
proverb|complaint|apology""",
    "relative": """mother|father|sister|brother|grandfather|aunt|uncle|cousin|neighbour|boss|colleague
best friend|teacher|daughter|son""",
    "hobby": """painting|running|chess|cooking|photography|gardening|hiking|knitting|woodworking|reading|dancing
cycling|climbing|yoga|playing the guitar|learning the piano|birdwatching|baking|sewing|stargazing|camping
swimming|writing|pottery|sailing|skiing""",
    "feeling": """lonely|stressed|bored|nervous|angry|homesick|overwhelmed|jealous|unmotivated|anxious
disappointed|shy|grateful|proud""",
    "goal": """learn to cook|wake up earlier|read more books|drink more water|stop procrastinating
save for a car|find a new job|learn Spanish|lose weight|run ten kilometres|make new friends|quit smoking
study more efficiently|organise my desk|write a novel|build a website|start a business|remember names
speak in public|sell my old furniture|reduce waste|move to another city|use my phone less|grow tomatoes
train a puppy|prepare for an interview|plan a wedding|clean the kitchen|paint a room|fix a leaking tap""",
    "ailment": """a headache|a cold|back pain|hiccups|a sore throat|sunburn|allergies|a fever|motion sickness
toothache|anemia|a cough""",
    "phenomenon": """the sea looks blue|the moon changes its shape|metal rusts|thunder follows lightning
bread rises|we yawn|we dream|the sun sets|volcanoes erupt|birds migrate|onions make us cry|soap cleans
planes fly|magnets attract iron|water boils|snow falls|cats purr|stars twinkle|hair turns grey
the earth has seasons|plants need light|ships do not sink|wine ages|salt melts snow""",
    "sport": """basketball|volleyball|cricket|baseball|rugby|badminton|chess|golf|hockey|handball|poker|checkers
darts|American football|snooker|water polo|curling|fencing|judo|boxing|a triathlon""",
    "issue": """school uniforms|a four-day week|working from home|electric cars|zoos|space travel|nuclear power
social media for children|free public transport|a sugar tax|exams|daylight saving time|eating meat
living in a city|voting at sixteen|artificial intelligence""",
    "unit": "metres|inches|feet|grams|ounces|pounds|litres|cups|minutes|hours|kilograms|centimetres",
    "days": "two|three|four|five|seven",
}
